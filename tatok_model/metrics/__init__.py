"""What evaluation computes: arithmetic on tensors, no files but weights, no Ray, no MLflow."""
