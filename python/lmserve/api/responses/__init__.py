"""The responses of `/v1/responses` that the server keeps."""
