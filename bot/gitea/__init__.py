"""Speaks to Gitea and Forgejo: webhooks in, REST out, split so that everything that decides does no I/O.

`sansio` verifies and parses deliveries and prepares and deciphers requests; `abc` adds retries, paging and redirects over two
abstract methods; `aiohttp` is the adapter; `routing` finds handlers; `forge` holds the operations the bot needs.

What can go wrong (all in `errors`)::

    ForgeError                 status, method, route (the URL template), message, headers; its text never holds a URL or token
    ├── Unauthorized           401: no token, or one the server does not know
    ├── Forbidden              403: scope, permission, locked, or the account must change its password
    ├── NotFound               404, 410; also what the token may not see
    ├── Moved                  3xx that must not be followed (a write, or another origin); `location`
    ├── Conflict               409: exists already, or changed meanwhile
    ├── PreconditionFailed     412: open dependencies, merged
    ├── Invalid                400, 422 and every other 4xx
    ├── Archived               423: the repository takes no writes
    ├── RateLimited            429; `retry_after` in seconds, or None
    ├── Unavailable            5xx, 408, network; `sent` tells whether the request may have arrived, `retry_after` as above
    ├── BadReply               success whose body is not what the API promises
    ├── OutcomeUnknown         a create that may or may not have happened: look before repeating
    └── ForeignOrigin          an address outside the configured server; nothing was sent
    BadDelivery                an incoming webhook that is refused; `status` to answer, `reason` to say
    ├── Unsigned               401
    ├── BadSignature           401
    ├── UnsupportedMedia       415
    ├── TooLarge               413
    └── Malformed              400
"""
