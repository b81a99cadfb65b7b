"""The plugins that come with Sapin, one file each; they register like anyone's, by entry points."""
