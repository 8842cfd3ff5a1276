"""What a checkpoint's files say: headers, facts, names and shapes of tensors."""
