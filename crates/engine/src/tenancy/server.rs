//! The server's own configuration (`/1.0`).

use crate::{Engine, context::Context};
use async_trait::async_trait;
use karst_model::{
    Config, Error, Result, access::Permission, backup::Compression, error::nearest, keys, project::Project,
    trust::ServerConfig,
};
use std::{net::SocketAddr, sync::Arc, time::Duration};

pub use karst_model::server_keys::SERVER_KEYS;

/// Port of the API when an address names none.
pub const DEFAULT_PORT: u16 = 8443;
/// Port of libvirt's protocol over TLS when an address names none.
pub const LIBVIRT_PORT: u16 = 16514;
/// Port of metrics when an address names none.
pub const METRICS_PORT: u16 = 8444;

/// The server's configuration in typed form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerSettings {
    /// Where the API listens.
    pub https_address: Option<SocketAddr>,
    /// Where libvirt's protocol is spoken over TLS.
    pub libvirt_address: Option<SocketAddr>,
    /// Names of this server that its certificate there has besides.
    pub libvirt_names: Vec<String>,
    /// Where metrics listen.
    pub metrics_address: Option<SocketAddr>,
    /// Are metrics open to everybody who reaches them?
    pub open_metrics: bool,
    /// How long a trust token is valid.
    pub token_lifetime: Option<Duration>,
    /// Do images that were fetched for an instance follow their server?
    pub auto_update_cached: bool,
    /// How often newer images are looked for; `None`: never.
    pub auto_update_interval: Option<Duration>,
    /// How published images are compressed.
    pub image_compression: Compression,
    /// How long an image that was fetched for an instance stays unused; `None`: for ever.
    pub remote_cache_expiry: Option<Duration>,
    /// How backups are compressed.
    pub backup_compression: Compression,
}

impl Default for ServerSettings {
    fn default() -> Self {
        Self {
            https_address: None,
            libvirt_address: None,
            libvirt_names: vec![],
            metrics_address: None,
            open_metrics: false,
            token_lifetime: None,
            auto_update_cached: true,
            auto_update_interval: Some(Duration::from_secs(6 * 3600)),
            image_compression: Compression::default(),
            remote_cache_expiry: Some(Duration::from_secs(10 * 86_400)),
            backup_compression: Compression::default(),
        }
    }
}

impl ServerSettings {
    /// Of configuration as written.
    ///
    /// # Errors
    /// Invalid, naming the key.
    pub fn parse(config: &Config) -> Result<Self> {
        let mut settings = Self::default();
        for (key, value) in config {
            let field = format!("config.{key}");
            match key.as_str() {
                k if k.starts_with("user.") => keys::check_free(key, value)?,
                "backups.compression_algorithm" => {
                    settings.backup_compression = Compression::parse(&field, value)?
                }
                "core.https_address" => settings.https_address = address(&field, value, DEFAULT_PORT)?,
                "core.libvirt_address" => settings.libvirt_address = address(&field, value, LIBVIRT_PORT)?,
                "core.libvirt_names" => settings.libvirt_names = names(&field, value)?,
                "core.metrics_address" => settings.metrics_address = address(&field, value, METRICS_PORT)?,
                "core.metrics_authentication" => settings.open_metrics = !keys::parse_bool(&field, value)?,
                "core.remote_token_expiry" => settings.token_lifetime = span(&field, value)?,
                "images.auto_update_cached" => settings.auto_update_cached = keys::parse_bool(&field, value)?,
                "images.auto_update_interval" => {
                    settings.auto_update_interval =
                        whole(&field, value, 3600)?.unwrap_or(settings.auto_update_interval);
                }
                "images.compression_algorithm" => {
                    settings.image_compression = Compression::parse(&field, value)?
                }
                "images.remote_cache_expiry" => {
                    settings.remote_cache_expiry =
                        whole(&field, value, 86_400)?.unwrap_or(settings.remote_cache_expiry);
                }
                _ => {
                    let hint = match nearest(key, SERVER_KEYS.iter().map(|(k, _)| *k)) {
                        Some(n) => format!("did you mean {n:?}?"),
                        None => {
                            let all: Vec<_> = SERVER_KEYS.iter().map(|(k, _)| *k).collect();
                            format!("known are {}, user.*", all.join(", "))
                        }
                    };
                    return Err(Error::invalid(field, format!("unknown server key {key:?}; {hint}")));
                }
            }
        }
        Ok(settings)
    }
}

/// An address as Incus takes it: `:8443`, `10.0.0.1`, `[::1]:8443`, `::1`; without a host it is every one.
fn address(field: &str, text: &str, port: u16) -> Result<Option<SocketAddr>> {
    let text = text.trim();
    if text.is_empty() {
        return Ok(None);
    }
    let every = |port| SocketAddr::new(std::net::Ipv6Addr::UNSPECIFIED.into(), port);
    let port_of = |p: &str| p.parse::<u16>().ok().filter(|p| *p > 0);
    let found = if let Some(p) = text.strip_prefix(':').filter(|p| !p.contains(':')) {
        port_of(p).map(every)
    } else if let Ok(full) = text.parse::<SocketAddr>() {
        Some(full).filter(|a| a.port() > 0)
    } else {
        let bare = text.trim_start_matches('[').trim_end_matches(']');
        bare.parse().ok().map(|ip| SocketAddr::new(ip, port))
    };
    found.map(Some).ok_or_else(|| {
        Error::invalid(
            field,
            format!("{text:?} is not an address such as :{port}, 10.0.0.1:{port} or [::1]:{port}"),
        )
    })
}

/// Most names of a certificate, and the longest of them.
const MOST_NAMES: usize = 64;
const LONGEST_NAME: usize = 253;

/// DNS names and addresses, separated by commas.
fn names(field: &str, text: &str) -> Result<Vec<String>> {
    let mut names: Vec<String> = vec![];
    for name in text.split(',').map(str::trim).filter(|n| !n.is_empty()) {
        let label = |l: &str| {
            let edge = l.starts_with('-') || l.ends_with('-');
            (1..=63).contains(&l.len()) && !edge && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        };
        let host = name.len() <= LONGEST_NAME && name.split('.').all(label);
        if !host && name.parse::<std::net::IpAddr>().is_err() {
            let message = format!("{name:?} is neither a DNS name such as host1.example.com nor an address");
            return Err(Error::invalid(field, message));
        }
        if !names.iter().any(|n| n == name) {
            names.push(name.to_owned());
        }
    }
    match names.len() > MOST_NAMES {
        true => Err(Error::invalid(field, format!("a certificate has at most {MOST_NAMES} names here"))),
        false => Ok(names),
    }
}

/// A whole number of `unit` seconds; the inner `None` is 0, the outer an empty text.
pub(super) fn whole(field: &str, text: &str, unit: u64) -> Result<Option<Option<Duration>>> {
    if text.is_empty() {
        return Ok(None);
    }
    let number = text.parse::<u64>().ok().filter(|n| *n <= 100_000);
    let number = number
        .ok_or_else(|| Error::invalid(field, format!("{text:?} is not a whole number up to 100000")))?;
    Ok(Some((number > 0).then(|| Duration::from_secs(number * unit))))
}

/// A time as Incus writes it: numbers with `S`, `M`, `H`, `d`, `w`, `m` (30 days), `y`.
fn span(field: &str, text: &str) -> Result<Option<Duration>> {
    let wrong = || {
        Error::invalid(
            field,
            format!("{text:?} is not a time such as 30M, 12H or 1d 12H (S, M, H, d, w, m, y)"),
        )
    };
    let mut seconds = 0u64;
    for word in text.split_whitespace() {
        let (number, unit) = word.split_at(word.len() - word.chars().next_back().map_or(0, char::len_utf8));
        let each = match unit {
            "S" => 1,
            "M" => 60,
            "H" => 3600,
            "d" => 86_400,
            "w" => 7 * 86_400,
            "m" => 30 * 86_400,
            "y" => 365 * 86_400,
            _ => return Err(wrong()),
        };
        let n: u64 = number.parse().map_err(|_| wrong())?;
        seconds = n.checked_mul(each).and_then(|s| seconds.checked_add(s)).ok_or_else(wrong)?;
    }
    // A hundred years are for ever.
    if seconds > 100 * 365 * 86_400 {
        return Err(wrong());
    }
    Ok((seconds > 0).then(|| Duration::from_secs(seconds)))
}

/// A listener on the network of another front end than the one that changes the server's configuration: a change that
/// cannot be listened for is not made.
#[async_trait]
pub trait NetworkListener: Send + Sync {
    /// Ends what `settings` no longer say, so that its port is free.
    async fn release(&self, settings: &ServerSettings);

    /// Listens as they say, if it does not yet.
    ///
    /// # Errors
    /// Invalid at the key whose address cannot be listened on.
    async fn ensure(&self, settings: &ServerSettings) -> Result<()>;
}

impl Engine {
    /// Says what else listens on the network as the server's configuration says.
    pub fn set_network_listener(&self, listener: Arc<dyn NetworkListener>) {
        *self.inner().network_listener.write().unwrap_or_else(|e| e.into_inner()) = Some(listener);
    }

    /// What else listens on the network.
    pub fn network_listener(&self) -> Option<Arc<dyn NetworkListener>> {
        self.inner().network_listener.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// The server's configuration in typed form, for the daemon's own listeners.
    pub fn server_settings(&self) -> ServerSettings {
        let config = self.inner().inventory.read().tenancy.server.as_ref().map(|s| s.config.clone());
        // What is recorded was checked; a later version's key must not keep this one from serving.
        ServerSettings::parse(&config.unwrap_or_default()).unwrap_or_default()
    }

    /// The server's settings with those over them that the project says otherwise.
    pub(crate) fn settings_in(&self, project: &Project) -> ServerSettings {
        let own = crate::visible::rules(project).settings;
        let mut all = self.server_settings();
        all.auto_update_cached = own.auto_update_cached.unwrap_or(all.auto_update_cached);
        all.auto_update_interval = own.auto_update_interval.unwrap_or(all.auto_update_interval);
        all.image_compression = own.image_compression.unwrap_or(all.image_compression);
        all.remote_cache_expiry = own.remote_cache_expiry.unwrap_or(all.remote_cache_expiry);
        all.backup_compression = own.backup_compression.unwrap_or(all.backup_compression);
        all
    }

    /// The server's configuration as written, and its version.
    ///
    /// # Errors
    /// Forbidden.
    pub fn server_config(&self, context: &Context) -> Result<ServerConfig> {
        context.demand_server(Permission::ServerInspect)?;
        Ok(self.inner().inventory.read().tenancy.server.as_ref().map(|s| s.value.clone()).unwrap_or_default())
    }

    /// Checks a change of the server's configuration without making it.
    ///
    /// # Errors
    /// Invalid by key, forbidden.
    pub fn server_config_check(&self, context: &Context, config: &Config) -> Result<ServerSettings> {
        context.demand_server(Permission::ServerEdit)?;
        ServerSettings::parse(config)
    }

    /// Replaces the server's configuration.
    ///
    /// # Errors
    /// Invalid by key, precondition failed, forbidden.
    pub async fn server_config_update(
        &self,
        context: &Context,
        config: Config,
        if_version: Option<u64>,
    ) -> Result<()> {
        context.demand_server(Permission::ServerEdit)?;
        ServerSettings::parse(&config)?;
        let kept: Config = config.into_iter().filter(|(_, v)| !v.is_empty()).collect();
        self.inner()
            .transact(|records, tx| {
                let old = records.tenancy.server.as_ref();
                let version = old.map_or(0, |s| s.spec_version);
                if if_version.is_some_and(|v| v != version) {
                    return Err(Error::precondition_failed(
                        "the server's configuration has changed since it was read; read it again",
                    ));
                }
                let new = ServerConfig { config: kept.clone(), spec_version: version + 1 };
                match old {
                    Some(row) => tx.replace(row, &new),
                    None => tx.create(&new),
                }
                Ok(())
            })
            .await?;
        self.inner().announce(context, None, "config-updated", "/1.0".into());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_times_as_incus_writes_them() {
        let parse = |k: &str, v: &str| ServerSettings::parse(&Config::from([(k.to_owned(), v.to_owned())]));
        for (text, wanted) in [
            (":8443", Some("[::]:8443")),
            ("10.0.0.1", Some("10.0.0.1:8443")),
            ("10.0.0.1:9", Some("10.0.0.1:9")),
            ("[::1]:9", Some("[::1]:9")),
            ("::1", Some("[::1]:8443")),
            ("", None),
        ] {
            let found = parse("core.https_address", text).unwrap().https_address;
            assert_eq!(found.map(|a| a.to_string()).as_deref(), wanted, "{text}");
        }
        for wrong in ["host", ":0", ":x", "1.2.3.4:99999", "8443"] {
            let e = parse("core.https_address", wrong).unwrap_err();
            assert_eq!(e.field.as_deref(), Some("config.core.https_address"), "{wrong}");
        }
        let libvirt = parse("core.libvirt_address", "127.0.0.1").unwrap().libvirt_address;
        assert_eq!(libvirt.map(|a| a.to_string()).as_deref(), Some("127.0.0.1:16514"));
        let said = |v: &str| parse("core.libvirt_names", v).map(|s| s.libvirt_names);
        assert_eq!(said("a.example.com, ::1,a.example.com,").unwrap(), ["a.example.com", "::1"]);
        for wrong in ["a b", "-a", "a..b", "*.example.com", "ü", &"a".repeat(64)] {
            let e = said(wrong).unwrap_err();
            assert_eq!(e.field.as_deref(), Some("config.core.libvirt_names"), "{wrong}");
        }
        assert!(said(&(0..65).map(|n| format!("n{n},")).collect::<String>()).is_err());
        let lifetime = |v| parse("core.remote_token_expiry", v).map(|s| s.token_lifetime);
        assert_eq!(lifetime("1d 12H").unwrap(), Some(Duration::from_secs(36 * 3600)));
        assert_eq!(lifetime("").unwrap(), None);
        for wrong in ["1", "d", "1x", "-1d", "99999999999999999999y", "200y", "1ü"] {
            assert!(lifetime(wrong).is_err(), "{wrong}");
        }
        let e = parse("core.https_adress", ":1").unwrap_err();
        assert!(e.message.contains("did you mean \"core.https_address\"?"), "{e}");
    }
}
