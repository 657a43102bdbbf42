"""Values of records: JSON, Avro and Protobuf, bare or as Confluent's clients frame them."""
