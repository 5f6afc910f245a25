"""What people get told: from findings to notifications. Its stages and channels come with the alerting release."""
