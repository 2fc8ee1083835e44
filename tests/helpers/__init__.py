"""What several test files share: tiny models, stores and folders, oracles, and processes to run commands in."""
