"""One job as its caller sees it: admit, submit, frames, retry, delivered record. The edge and the router's front door use it."""
