"""What a test leaves behind: a record in JSON, and a page that compares records."""
