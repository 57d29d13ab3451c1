"""A study on one HTML page: `page.report`."""
