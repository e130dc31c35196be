"""Expert state between shards and slots: packed for the wire, or straight through the memory of peers."""
