"""What every part may use: errors, files, images, devices, memory, ranks. It imports nothing else of the package."""
