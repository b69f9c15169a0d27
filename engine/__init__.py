"""Trains and runs: packs, the decoder, adapters, the loop, generation and the ledger."""
