"""What a worker does: lane tree, exchange, mirrors, vote, apply, gather; forming and recovery. torch, no Ray."""
