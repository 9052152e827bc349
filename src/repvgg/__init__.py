"""RepVGG: model core, data, learning and reports. See CONTRIBUTING.md for the rooms."""
