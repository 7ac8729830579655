"""The rules that update parameters, and how each of them sees ZeRO's partitions and tensor shards."""
