"""Measures with ground truth. Import the modules directly: `attnctrl.evaluate.icons`, `.t2i`, `.intervals`."""
