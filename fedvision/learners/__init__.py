"""What a client learns."""
