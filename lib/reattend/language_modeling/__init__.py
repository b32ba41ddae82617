"""Language models trained from scratch: attention variants and what replaces attention."""
