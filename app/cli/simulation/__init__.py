"""What a policy of the scheduler does to traffic: a simulation that needs no device, no thread and no clock."""
