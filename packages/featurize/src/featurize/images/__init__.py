"""Image files to pixels: `decode` (bytes to RGB) and `crop` (the box and its resizing). Imports only `errors`."""
