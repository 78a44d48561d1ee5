"""Operations: from a validated request to its result, for HTTP and the command line alike. They know no HTTP."""
