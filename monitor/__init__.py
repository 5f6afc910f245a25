"""What a projection means, and the service around it: contract, axis, detector, log, store, worker. No torch here."""
