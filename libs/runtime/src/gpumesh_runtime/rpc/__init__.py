"""gRPC as every process of ours uses it: `server.Server` and `client.channel`, with the same limits and keepalive on
both ends.
"""
