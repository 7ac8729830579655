"""Speed of training and generation, beside a peer and beside what the machine can do."""
