"""OpenAI's wire format: requests in, answers out. Pure: no network, no clock of its own."""
