"""What a task is learned from: rows that the model tries first, judged and chosen."""
