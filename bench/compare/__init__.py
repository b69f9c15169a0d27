"""Side by side with transformers, PEFT and HF Trainer on the CPU: the same work, in turns, in separate processes."""
