"""Image files to pixels: `decode` (bytes to upright RGB) and `crop` (the box and its resizing). `jpeg`, `grey` and `profile`
serve `decode`; `on_device` does both on a GPU. Imports only `errors`."""
