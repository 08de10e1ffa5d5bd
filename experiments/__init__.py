"""Programs: one per thing a user does."""
