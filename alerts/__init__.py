"""What people get told: from findings to notifications."""
