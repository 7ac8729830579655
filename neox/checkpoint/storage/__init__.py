"""Files of tensors, whoever wrote them: read and written one tensor at a time."""
