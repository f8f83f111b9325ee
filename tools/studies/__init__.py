"""Series of trainings and measurements that can be interrupted and repeated, with one table of results."""
