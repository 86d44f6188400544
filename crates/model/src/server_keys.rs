//! Keys of the server's own configuration. What they hold is read where it is used, in the engine.

/// Keys of the server: name and text. `user.*` is free.
pub const SERVER_KEYS: &[(&str, &str)] = &[
    (
        "backups.compression_algorithm",
        "How backups are compressed: none, gzip, zstd, xz, bzip2 (default gzip)",
    ),
    ("core.https_address", "Address and port of the API over HTTPS, such as `:8443`; none when empty"),
    (
        "core.libvirt_address",
        "Address and port of libvirt's protocol over TLS, such as `:16514`; none when empty",
    ),
    (
        "core.libvirt_names",
        "More DNS names and addresses by which libvirt's clients reach this server, separated by commas; its certificate has them",
    ),
    ("core.metrics_address", "Address and port of an HTTPS listener that answers metrics only"),
    ("core.metrics_authentication", "Whether metrics are for authenticated clients only (default true)"),
    ("core.remote_token_expiry", "How long a trust token is valid, such as `1d 12H`; for ever when empty"),
    (
        "images.auto_update_cached",
        "Whether images that were fetched for an instance follow their server (default true)",
    ),
    (
        "images.auto_update_interval",
        "Hours after which newer images are looked for; never when 0 (default 6)",
    ),
    (
        "images.compression_algorithm",
        "How published images are compressed: none, gzip, zstd, xz, bzip2 (default gzip)",
    ),
    (
        "images.remote_cache_expiry",
        "Days after which an image that was fetched for an instance goes when nobody uses it; never when 0 (default 10)",
    ),
];
