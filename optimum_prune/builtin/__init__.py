"""The plugins that come along, one file each; nothing imports them."""
