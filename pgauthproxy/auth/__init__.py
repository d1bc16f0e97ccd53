"""Who decides: the question, the answer, and the kinds of authenticator."""
