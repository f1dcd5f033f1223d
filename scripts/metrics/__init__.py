"""Image metrics: weights and features (`inception`), numbers (`scores`), readers (`inputs`)."""
