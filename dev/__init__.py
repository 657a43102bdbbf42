"""What developing needs and the wheel does not carry: real servers, set-up, the stack."""
