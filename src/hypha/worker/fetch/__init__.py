"""What a job's references name, fetched within the owner's allow-lists, and results stored."""
