"""An HTTP server with OpenAI's API: requests become jobs, jobs are answered in turn, answers get their form."""
