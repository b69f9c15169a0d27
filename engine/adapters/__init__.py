"""PEFT methods: the bank of trainable parameters and one file a method."""
