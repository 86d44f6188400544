//! Managed networks of one host: a bridge with its address, translation of addresses, DHCP and DNS.
//!
//! Everything of a network is reconciled by [`NetworkDriver::ensure`], which may be called as often as one likes and may be
//! killed anywhere: what exists outside of the driver's directory is recorded there before it is made, carries the daemon's
//! short id, and is compared with what is wanted each time. See `docs/adr/0007-networking.md`.
#![allow(clippy::disallowed_methods)] // drivers live in the real world: its clock, its tasks

mod acl_log;
mod bridge;
mod detached;
mod dnsmasq;
mod firewall;
mod leases;
mod loose;
mod record;
mod render;
mod rules;
mod ruleset;
mod strays;
mod subnet;
mod views;
mod walls;

use firewall::Firewall;
use ipnet::{Ipv4Net, Ipv6Net};
use karst_host::{link, nft, process::Process, sysctl};
use karst_model::{
    Error, NetworkId, Result,
    network::Lease,
    spec::{NetworkHost, NetworkSpec},
};
pub use loose::LoosePort;
use record::{Paths, Record};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, Weak},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Waits between restarts of a dnsmasq that dies: doubled from the first up to the second.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));
/// A dnsmasq that ran this long counts as healthy again.
const HEALTHY: Duration = Duration::from_secs(60);
/// After the ruleset changed, so long nothing more must change before it is repaired: others apply theirs in several steps.
const QUIET: Duration = Duration::from_millis(200);

/// Networks of one daemon on this host. Cheap to clone.
#[derive(Debug, Clone)]
pub struct NetworkDriver(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    daemon: String,
    paths: Paths,
    networks: Mutex<HashMap<NetworkId, Arc<tokio::sync::Mutex<Live>>>>,
    firewall: tokio::sync::Mutex<Firewall>,
    watch: OnceLock<tokio::task::AbortHandle>,
}

/// What this process knows of a network.
#[derive(Debug, Default)]
struct Live {
    dnsmasq: Option<Process>,
    watcher: Option<tokio::task::AbortHandle>,
    views: views::Views,
}

/// State of a bridge now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct NetworkState {
    /// MAC address.
    pub mac: String,
    /// MTU in bytes.
    pub mtu: u32,
    /// Link is up.
    pub up: bool,
    /// Addresses: address, prefix length, scope.
    pub addresses: Vec<(IpAddr, u8, String)>,
    /// Received bytes, sent bytes, received packets, sent packets.
    pub counters: [u64; 4],
    /// Interfaces in the bridge.
    pub ports: Vec<String>,
    /// Pid of its dnsmasq.
    pub dnsmasq: Option<i32>,
}

/// A network that was found again.
#[derive(Debug)]
pub struct Adopted {
    /// Which.
    pub id: NetworkId,
    /// Its bridge.
    pub bridge: String,
    /// Its dnsmasq had been running on.
    pub survived: bool,
    /// Whether it is whole now.
    pub result: Result<()>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        let networks = self.networks.get_mut().unwrap_or_else(|e| e.into_inner());
        for live in networks.values() {
            if let Some(watcher) = live.try_lock().ok().and_then(|mut l| l.watcher.take()) {
                watcher.abort();
            }
        }
        if let Some(watch) = self.watch.get() {
            watch.abort();
        }
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| Error::internal("work on a network was broken off", e))?
}

/// What a guest is given that asks nobody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    /// Its address.
    pub address: Ipv4Net,
    /// Its way out.
    pub gateway: Option<Ipv4Addr>,
    /// Whom it asks for names.
    pub nameservers: Vec<IpAddr>,
    /// Domains of short names.
    pub search: Vec<String>,
}

impl NetworkDriver {
    /// `daemon_id`: the short id of the daemon's instance (lower-case letters and digits, at most 8). `state_dir`: an
    /// absolute path, root-owned, the driver's alone; made when it is missing. Directories above it must allow others to pass
    /// through (`o+x`), for dnsmasq runs without privileges.
    ///
    /// # Panics
    /// When the id is of another form: it becomes part of nft's and iptables' text.
    pub fn new(daemon_id: &str, state_dir: impl Into<PathBuf>) -> Self {
        assert!(
            (1..=8).contains(&daemon_id.len())
                && daemon_id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()),
            "a daemon's short id is of lower-case letters and digits"
        );
        Self(Arc::new(Inner {
            daemon: daemon_id.to_owned(),
            paths: Paths(state_dir.into()),
            networks: Mutex::default(),
            firewall: tokio::sync::Mutex::default(),
            watch: OnceLock::new(),
        }))
    }

    fn live(&self, id: NetworkId) -> Arc<tokio::sync::Mutex<Live>> {
        let mut networks = self.0.networks.lock().unwrap_or_else(|e| e.into_inner());
        networks.entry(id).or_default().clone()
    }

    /// Makes the network what `spec` says: bridge, addresses, kernel settings, firewall, dnsmasq and its guests. Idempotent;
    /// without a program run where nothing changed.
    ///
    /// # Errors
    /// Conflict when the interface exists and is not ours, when another network has the bridge or overlaps the subnet, or
    /// when another server holds the ports; invalid for a specification that does not fit together; unsupported when a
    /// program is missing.
    pub async fn ensure(&self, spec: &NetworkSpec) -> Result<()> {
        let network = self.live(spec.id);
        let mut live = network.lock().await;
        self.ensure_locked(&network, &mut live, spec).await
    }

    async fn ensure_locked(
        &self,
        network: &Arc<tokio::sync::Mutex<Live>>,
        live: &mut Live,
        spec: &NetworkSpec,
    ) -> Result<()> {
        render::check(&spec.bridge, &spec.spec)?;
        check_rules(spec)?;
        let told = NetworkSpec { hosts: render::check_hosts(&spec.spec, &spec.hosts)?, ..spec.clone() };
        let record =
            Record { id: spec.id, bridge: spec.bridge.clone(), spec: spec.spec.clone(), removing: false };
        dnsmasq::try_lines(&self.0.daemon, &self.0.paths, &record).await?;
        // Writing records and looking at those of others is one step against a second network made at the same time.
        let mut firewall = self.0.firewall.lock().await;
        let (paths, daemon, wanted) = (self.0.paths.clone(), self.0.daemon.clone(), record.clone());
        let known: Vec<NetworkId> = firewall.known.iter().map(|n| n.id).collect();
        let (records, effective, missing, gone) = blocking(move || {
            paths.prepare()?;
            bridge::ensure(&daemon, &paths, &wanted)?;
            let before = paths.read_spec(&wanted).hosts;
            let effective = reserve(&paths, &told)?;
            paths.write_spec(&told)?;
            bridge::routes(&effective)?;
            let records = paths.records()?;
            let missing = records.iter().filter(|r| r.id != wanted.id && !known.contains(&r.id));
            let missing =
                missing.map(|r| reserve(&paths, &paths.read_spec(r))).collect::<Result<Vec<_>>>()?;
            let gone: Vec<_> = read_leases(&paths, wanted.id)
                .into_iter()
                .filter(|e| {
                    before.iter().any(|h| h.mac == e.mac) && !effective.hosts.iter().any(|h| h.mac == e.mac)
                })
                .collect();
            Ok((records, effective, missing, gone))
        })
        .await?;
        firewall.known.retain(|n| n.id != spec.id && records.iter().any(|r| r.id == n.id));
        firewall.known.extend(missing);
        firewall.known.push(effective.clone());
        firewall.known.sort_by_key(|n| n.id);
        firewall.reconcile(&self.0.daemon, &self.0.paths).await?;
        drop(firewall);
        // Who comes back meets the rules.
        let (paths, bridge) = (self.0.paths.clone(), spec.bridge.clone());
        let id = spec.id;
        blocking(move || detached::attach(&paths, id, &bridge)).await?;
        self.ensure_dnsmasq(live, record.clone(), effective.hosts.clone()).await?;
        self.ensure_views(network, &mut live.views, &record, &effective).await?;
        if let Some(net) = spec.spec.ipv4
            && !gone.is_empty()
            && let Err(e) = release(&spec.bridge, net.addr(), &gone).await
        {
            // They run out by themselves within the hour.
            tracing::warn!(bridge = %spec.bridge, error = %e, "leases of guests that are gone could not be given back");
        }
        Ok(())
    }

    async fn ensure_dnsmasq(&self, live: &mut Live, record: Record, hosts: Vec<NetworkHost>) -> Result<()> {
        let (paths, daemon, known) = (self.0.paths.clone(), self.0.daemon.clone(), live.dnsmasq.clone());
        let wanted = record.clone();
        let (process, changed) = blocking(move || {
            let hosts_changed = dnsmasq::write_hosts(&paths, &wanted, &hosts)?;
            let configuration = dnsmasq::write_configuration(&daemon, &paths, &wanted, None)?;
            let running = match known.filter(Process::alive) {
                Some(process) => Some(process),
                None => dnsmasq::find(&paths, wanted.id)?,
            };
            let Some(changed) = configuration else {
                if running.is_some() {
                    dnsmasq::stop(&paths, wanted.id)?;
                }
                return Ok((None, false));
            };
            if changed {
                return Ok((None, true));
            }
            if hosts_changed && let Some(process) = &running {
                dnsmasq::reload(process)?;
            }
            let missing = running.is_none();
            Ok((running, missing))
        })
        .await?;
        let process = match (process, changed) {
            (None, true) => Some(self.start_dnsmasq(&record).await?),
            (process, _) => process,
        };
        let same = match (&live.dnsmasq, &process) {
            (Some(a), Some(b)) => {
                a.pid() == b.pid() && live.watcher.as_ref().is_some_and(|w| !w.is_finished())
            }
            _ => false,
        };
        if !same {
            if let Some(watcher) = live.watcher.take() {
                watcher.abort();
            }
            live.watcher = process.clone().map(|p| self.watch_dnsmasq(record.id, p));
        }
        live.dnsmasq = process;
        Ok(())
    }

    async fn start_dnsmasq(&self, record: &Record) -> Result<Process> {
        let result = dnsmasq::start(&self.0.paths, record).await;
        if let Ok(process) = &result {
            tracing::info!(bridge = %record.bridge, pid = process.pid(), "DHCP and DNS started");
        }
        result
    }

    /// Watches a dnsmasq and starts it again when it ends, ever more slowly if it keeps ending.
    fn watch_dnsmasq(&self, id: NetworkId, process: Process) -> tokio::task::AbortHandle {
        let inner = Arc::downgrade(&self.0);
        tokio::spawn(watch_dnsmasq(inner, id, process)).abort_handle()
    }

    /// Replaces the guests of a network, live: dnsmasq reads the new lists, it is not restarted. Leases of guests that are no
    /// longer in the list are given back, so that their names and addresses are free at once.
    ///
    /// # Errors
    /// Not found; invalid; conflict when two guests have the same MAC or static address.
    pub async fn set_hosts(&self, id: NetworkId, hosts: &[NetworkHost]) -> Result<()> {
        let paths = self.0.paths.clone();
        let spec = blocking(move || Ok(paths.read_spec(&known(&paths, id)?))).await?;
        self.ensure(&NetworkSpec { hosts: hosts.to_vec(), ..spec }).await
    }

    /// Removes a network and all that belongs to it. Idempotent: also finishes what an earlier call began, and removes what
    /// carries the network's mark though no record of it is left.
    ///
    /// # Errors
    /// Internal.
    pub async fn remove(&self, id: NetworkId) -> Result<()> {
        self.take_down(id).await?;
        let paths = self.0.paths.clone();
        blocking(move || detached::forget(&paths, id)).await
    }

    /// All of a network, but for what is kept to put guests back onto it.
    async fn take_down(&self, id: NetworkId) -> Result<()> {
        let live = self.live(id);
        let mut live = live.lock().await;
        if let Some(watcher) = live.watcher.take() {
            watcher.abort();
        }
        live.dnsmasq = None;
        live.views = views::Views::default();
        let mut firewall = self.0.firewall.lock().await;
        let paths = self.0.paths.clone();
        let records = blocking(move || {
            if let Some(record) = paths.read(id)? {
                paths.write(&Record { removing: true, ..record })?;
            }
            dnsmasq::stop(&paths, id)?;
            views::stop(&paths, id, &BTreeMap::new())?;
            let records = paths.records()?;
            records.iter().map(|r| reserve(&paths, &paths.read_spec(r))).collect::<Result<Vec<_>>>()
        })
        .await?;
        firewall.known = records;
        firewall.reconcile(&self.0.daemon, &self.0.paths).await?;
        let (paths, daemon) = (self.0.paths.clone(), self.0.daemon.clone());
        blocking(move || {
            bridge::delete(&daemon, &paths, id)?;
            remove_directory(&paths.network(id))
        })
        .await?;
        drop(firewall);
        self.0.networks.lock().unwrap_or_else(|e| e.into_inner()).remove(&id);
        Ok(())
    }

    /// Leases given out and static addresses, in order of address.
    ///
    /// # Errors
    /// Not found.
    pub async fn leases(&self, id: NetworkId) -> Result<Vec<Lease>> {
        let paths = self.0.paths.clone();
        blocking(move || {
            let told = paths.read_spec(&known(&paths, id)?);
            Ok(leases::merge(&read_leases(&paths, id), &told.spec, &told.hosts))
        })
        .await
    }

    /// What a guest that asks nobody is given on a network: the address that is kept for it, and what DHCP would tell it.
    /// `None` when the network has no IPv4, or no address was left.
    ///
    /// # Errors
    /// Not found.
    pub async fn given(&self, id: NetworkId, mac: &str) -> Result<Option<Given>> {
        let (paths, mac) = (self.0.paths.clone(), mac.to_ascii_lowercase());
        blocking(move || {
            let told = paths.read_spec(&known(&paths, id)?);
            let Some(net) = told.spec.ipv4 else { return Ok(None) };
            let fixed = told.hosts.iter().find(|h| h.mac.eq_ignore_ascii_case(&mac)).and_then(|h| h.ipv4);
            let kept = || paths.read_reserved(id).into_iter().find(|(m, _)| m.eq_ignore_ascii_case(&mac));
            let Some(address) = fixed.or_else(|| kept().map(|(_, a)| a)) else { return Ok(None) };
            let Ok(address) = Ipv4Net::new(address, net.prefix_len()) else { return Ok(None) };
            let named = told.spec.nameservers.clone();
            Ok(Some(Given {
                address,
                gateway: told.spec.dhcp_gateway.or(Some(net.addr())),
                nameservers: if named.is_empty() { vec![IpAddr::V4(net.addr())] } else { named },
                search: match told.spec.search.is_empty() {
                    true => vec![told.spec.domain],
                    false => told.spec.search,
                },
            }))
        })
        .await
    }

    /// The bridge as it is now.
    ///
    /// # Errors
    /// Not found, also when somebody deleted the link.
    pub async fn state(&self, id: NetworkId) -> Result<NetworkState> {
        let paths = self.0.paths.clone();
        blocking(move || {
            let record = known(&paths, id)?;
            let found = link::get(&record.bridge)?
                .ok_or_else(|| Error::not_found(format!("the bridge {:?} is not there", record.bridge)))?;
            let addresses = link::addresses(Some(found.index))?;
            let ports = link::list()?.into_iter().filter(|l| l.master == Some(found.index));
            Ok(NetworkState {
                mac: found.mac.unwrap_or_default(),
                mtu: found.mtu,
                up: found.up,
                addresses: addresses
                    .iter()
                    .map(|a| (a.address, a.prefix, a.scope_name().to_owned()))
                    .collect(),
                counters: found.counters,
                ports: ports.map(|l| l.name).collect(),
                dnsmasq: dnsmasq::find(&paths, id)?.map(|p| p.pid()),
            })
        })
        .await
    }

    /// Networks that this driver keeps.
    ///
    /// # Errors
    /// Internal.
    pub async fn list(&self) -> Result<Vec<(NetworkId, String)>> {
        let paths = self.0.paths.clone();
        blocking(move || Ok(paths.records()?.into_iter().map(|r| (r.id, r.bridge)).collect())).await
    }

    /// Base chains of other firewalls that drop the guests' packets and that Karst cannot open by itself.
    pub async fn warnings(&self) -> Vec<String> {
        self.0.firewall.lock().await.warnings.clone()
    }

    /// Once at the start of the host's process: finishes removals, makes every recorded network whole again (a dnsmasq that
    /// runs is kept), and from then on repairs the firewall as soon as somebody changes it.
    ///
    /// # Errors
    /// Internal when the records cannot be read; what fails for one network stands in its [`Adopted::result`].
    pub async fn adopt(&self) -> Result<Vec<Adopted>> {
        let paths = self.0.paths.clone();
        let records = blocking(move || {
            paths
                .ids()?
                .into_iter()
                .map(|id| {
                    let record = paths.read(id)?;
                    let spec = record.as_ref().map(|r| paths.read_spec(r));
                    Ok((id, record, spec, dnsmasq::find(&paths, id)?))
                })
                .collect::<Result<Vec<_>>>()
        })
        .await?;
        let mut adopted = Vec::new();
        for (id, record, spec, running) in records {
            let (Some(record), Some(spec)) = (record.filter(|r| !r.removing), spec) else {
                // Begun or torn: nothing of it was acknowledged.
                if let Err(e) = self.remove(id).await {
                    tracing::error!(network = %id, error = %e, context = e.context, "what is left of a network could not be removed");
                }
                continue;
            };
            let spec = NetworkSpec { bridge: record.bridge.clone(), spec: record.spec, ..spec };
            let result = self.ensure(&spec).await;
            let now = self.live(id).lock().await.dnsmasq.as_ref().map(Process::pid);
            let survived = running.is_some() && running.map(|p| p.pid()) == now;
            if let Err(e) = &result {
                tracing::error!(bridge = %record.bridge, error = %e, context = e.context, "network could not be adopted");
            }
            adopted.push(Adopted { id, bridge: record.bridge, survived, result });
        }
        let watch = nft::Watch::new()?;
        let weak = Arc::downgrade(&self.0);
        self.0.watch.get_or_init(|| tokio::spawn(watch_firewall(weak, watch)).abort_handle());
        Ok(adopted)
    }

    /// A private /24, as its first host address, that overlaps no address, route or name server of this host, no network of
    /// this daemon and none of `taken`.
    ///
    /// # Errors
    /// Conflict when all private addresses are taken.
    pub async fn find_free_subnet(&self, taken: &[Ipv4Net]) -> Result<Ipv4Net> {
        let (paths, daemon, mut taken) = (self.0.paths.clone(), self.0.daemon.clone(), taken.to_vec());
        blocking(move || {
            taken.extend(paths.records()?.iter().filter_map(|r| r.spec.ipv4));
            let address = |a: IpAddr, prefix: u8| match a {
                IpAddr::V4(a) => Ipv4Net::new(a, prefix).ok(),
                IpAddr::V6(_) => None,
            };
            taken.extend(link::addresses(None)?.iter().filter_map(|a| address(a.address, a.prefix)));
            taken.extend(link::routes()?.iter().filter_map(|(a, p)| address((*a).into(), *p)));
            let resolv = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
            taken.extend(render::nameservers(&resolv).filter_map(|a| address(a, 32)));
            subnet::pick(&daemon, &taken).ok_or_else(|| {
                Error::conflict("this host's addresses and routes leave no private subnet free; choose one by ipv4.address")
                    .at("config.ipv4.address")
            })
        })
        .await
    }

    /// A private /64 (RFC 4193), as its first host address; `None` when this kernel has no IPv6.
    ///
    /// # Errors
    /// Internal.
    pub async fn find_free_subnet6(&self) -> Result<Option<Ipv6Net>> {
        let paths = self.0.paths.clone();
        blocking(move || {
            if sysctl::get(&["net", "ipv6", "conf", "all", "forwarding"])?.is_none() {
                return Ok(None);
            }
            let taken: Vec<Ipv6Net> = paths.records()?.iter().filter_map(|r| r.spec.ipv6).collect();
            for _ in 0..64 {
                let mut b = *uuid::Uuid::new_v4().as_bytes();
                b[0] = 0xfd;
                b[1] = 0x42;
                b[8..].fill(0);
                b[15] = 1;
                let net = Ipv6Net::new_assert(b.into(), 64);
                if !taken.iter().any(|t| t.contains(&net.network()) || net.contains(&t.network())) {
                    return Ok(Some(net));
                }
            }
            Ok(None)
        })
        .await
    }

    /// `wanted`, or the same with the next free number.
    ///
    /// # Errors
    /// Invalid when it is no interface name.
    pub async fn find_free_bridge_name(&self, wanted: &str) -> Result<String> {
        karst_model::device::interface_name("name", wanted)?;
        let (paths, wanted) = (self.0.paths.clone(), wanted.to_owned());
        blocking(move || {
            let recorded: Vec<String> = paths.records()?.into_iter().map(|r| r.bridge).collect();
            let stem = wanted.trim_end_matches(|c: char| c.is_ascii_digit());
            let first: u32 = wanted[stem.len()..].parse().unwrap_or(0);
            let numbered = (1..10_000).map(|n| format!("{stem}{}", first.saturating_add(n)));
            for name in std::iter::once(wanted.clone()).chain(numbered).filter(|n| n.len() <= 15) {
                if !recorded.contains(&name) && !link::exists(&name)? {
                    return Ok(name);
                }
            }
            Err(Error::conflict(format!("no interface name like {wanted:?} is free")))
        })
        .await
    }

    /// Removes everything that carries this daemon's mark, recorded or not, and gives back what it changed on the host.
    ///
    /// # Errors
    /// All that would not go, after everything was tried; the records stay then.
    pub async fn purge(&self) -> Result<()> {
        let mut failed = vec![];
        let paths = self.0.paths.clone();
        match blocking(move || paths.ids()).await {
            Err(e) => failed.push(e),
            Ok(ids) => {
                for id in ids {
                    failed.extend(self.remove(id).await.err());
                }
            }
        }
        let mut firewall = self.0.firewall.lock().await;
        failed.extend(firewall.purge(&self.0.daemon, &self.0.paths).await.err());
        let (paths, daemon) = (self.0.paths.clone(), self.0.daemon.clone());
        let swept =
            blocking(move || Ok([dnsmasq::stop_all(&paths).err(), bridge::delete_all(&daemon).err()]));
        failed.extend(swept.await?.into_iter().flatten());
        failed.extend(Self::give_back(&self.0.paths).await.err());
        Error::together(failed)?;
        let paths = self.0.paths.clone();
        blocking(move || remove_directory(&paths.0)).await
    }

    /// Settings of the kernel that were changed for networks.
    async fn give_back(paths: &Paths) -> Result<()> {
        let paths = paths.clone();
        let switched_on = blocking(move || paths.read_host()).await?;
        if (switched_on.forwarding_switched_on || switched_on.forwarding6_switched_on)
            && !firewall::others_forward().await?
        {
            if switched_on.forwarding_switched_on {
                sysctl::set(&["net", "ipv4", "ip_forward"], "0")?;
            }
            if switched_on.forwarding6_switched_on {
                sysctl::set(&["net", "ipv6", "conf", "all", "forwarding"], "0")?;
                for link in &switched_on.accept_ra {
                    sysctl::set(&["net", "ipv6", "conf", link, "accept_ra"], "1")?;
                }
            }
        }
        Ok(())
    }
}

/// Names that come to stand in nft's text, beyond what the types say.
fn check_rules(spec: &NetworkSpec) -> Result<()> {
    for name in spec.acls.iter().map(|a| &a.name).chain(spec.sets.iter().map(|s| &s.name)) {
        karst_model::firewall::object_name("acl", name)?;
    }
    if spec.forwards.iter().flat_map(|f| &f.targets).any(|t| {
        t.listen.0 == 0
            || t.listen.0 > t.listen.1
            || !t.single && t.port.is_some_and(|p| p.checked_add(t.listen.1 - t.listen.0).is_none())
    }) {
        return Err(Error::invalid(
            "forwards",
            "a range of ports is upside down or leads beyond the last port",
        ));
    }
    Ok(())
}

/// The network with an IPv4 address for each guest whose rules depend on one: kept by MAC address as long as the guest is
/// there, so that its rules never have to wait for its DHCP client.
fn reserve(paths: &Paths, spec: &NetworkSpec) -> Result<NetworkSpec> {
    let mut effective = spec.clone();
    views::assign(paths, &mut effective)?;
    let Some(net) = spec.spec.ipv4 else { return Ok(effective) };
    let before = paths.read_reserved(spec.id);
    let needs = |h: &NetworkHost| {
        let ruled = || h.port.as_ref().is_some_and(|p| p.needs_address());
        h.ipv4.is_none() && (h.given || h.view.is_some() || ruled())
    };
    if before.is_empty() && !effective.hosts.iter().any(needs) {
        return Ok(effective);
    }
    let ranges = if spec.spec.dhcp_ranges.is_empty() {
        vec![render::whole(net)]
    } else {
        spec.spec.dhcp_ranges.clone()
    };
    let inside = |a: &Ipv4Addr| net.contains(a) && ranges.iter().any(|(f, l)| (f..=l).contains(&a));
    let mut taken: BTreeSet<Ipv4Addr> = spec.hosts.iter().filter_map(|h| h.ipv4).collect();
    taken.insert(net.addr());
    let mut reserved: BTreeMap<String, Ipv4Addr> = BTreeMap::new();
    for host in spec.hosts.iter().filter(|h| needs(h)) {
        if let Some(address) = before.get(&host.mac).filter(|a| inside(a) && !taken.contains(a)) {
            taken.insert(*address);
            reserved.insert(host.mac.clone(), *address);
        }
    }
    // What it has now, if it has one; otherwise the first that nobody has.
    let leases: Vec<(String, Ipv4Addr)> = read_leases(paths, spec.id)
        .into_iter()
        .filter_map(|e| match e.address {
            IpAddr::V4(a) => Some((e.mac, a)),
            IpAddr::V6(_) => None,
        })
        .collect();
    for host in spec.hosts.iter().filter(|h| needs(h)) {
        if reserved.contains_key(&host.mac) {
            continue;
        }
        let own =
            leases.iter().find(|(m, a)| *m == host.mac && inside(a) && !taken.contains(a)).map(|(_, a)| *a);
        let free = || {
            let all = ranges.iter().flat_map(|(f, l)| (u32::from(*f)..=u32::from(*l)).map(Ipv4Addr::from));
            all.filter(|a| !leases.iter().any(|(_, l)| l == a)).find(|a| !taken.contains(a))
        };
        let Some(address) = own.or_else(free) else {
            tracing::warn!(bridge = %spec.bridge, mac = %host.mac, "no address is left for a guest whose rules need one");
            continue;
        };
        taken.insert(address);
        reserved.insert(host.mac.clone(), address);
    }
    paths.write_reserved(spec.id, &reserved)?;
    for host in &mut effective.hosts {
        if let Some(address) = reserved.get(&host.mac) {
            host.ipv4 = Some(*address);
        }
    }
    Ok(effective)
}

fn known(paths: &Paths, id: NetworkId) -> Result<Record> {
    paths.read(id)?.filter(|r| !r.removing).ok_or_else(|| Error::not_found("the network is not on this host"))
}

fn read_leases(paths: &Paths, id: NetworkId) -> Vec<leases::Entry> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let text = std::fs::read_to_string(paths.file(id, "dnsmasq.leases")).unwrap_or_default();
    leases::parse(&text, now)
}

fn remove_directory(path: &std::path::Path) -> Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
        _ => Ok(()),
    }
}

async fn release(bridge: &str, server: Ipv4Addr, gone: &[leases::Entry]) -> Result<()> {
    let socket = tokio::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
    // dnsmasq's own socket hears this bridge alone, and a packet sent from here counts as the bridge's only so.
    socket.bind_device(Some(bridge.as_bytes()))?;
    for (n, entry) in gone.iter().enumerate() {
        let IpAddr::V4(address) = entry.address else { continue };
        let packet = leases::release(link::parse_mac(&entry.mac)?, address, server, n as u32 + 1);
        socket.send_to(&packet, (server, 67)).await?;
    }
    Ok(())
}

async fn watch_dnsmasq(inner: Weak<Inner>, id: NetworkId, mut process: Process) {
    let mut wait = BACK_OFF.0;
    let mut since = Instant::now();
    loop {
        let ended = tokio::time::timeout(HEALTHY, process.ended()).await;
        let Some(driver) = inner.upgrade().map(NetworkDriver) else {
            return;
        };
        match ended {
            Err(_) => {
                let paths = driver.0.paths.clone();
                let _ = blocking(move || {
                    dnsmasq::trim_log(&paths, id);
                    Ok(())
                })
                .await;
                continue;
            }
            Ok(Err(e)) => {
                tracing::error!(error = %e, "a dnsmasq can not be watched");
                return;
            }
            Ok(Ok(())) => {}
        }
        if since.elapsed() > HEALTHY {
            wait = BACK_OFF.0;
        }
        drop(driver);
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(BACK_OFF.1);
        let Some(driver) = inner.upgrade().map(NetworkDriver) else {
            return;
        };
        let live = driver.live(id);
        let mut live = live.lock().await;
        if live.dnsmasq.as_ref().is_none_or(|p| p.pid() != process.pid()) {
            return; // `ensure` or `remove` was faster
        }
        let Ok(Some(record)) = driver.0.paths.read(id) else {
            return;
        };
        let tail = dnsmasq::log_tail(&driver.0.paths, id);
        let last = tail.lines().last().unwrap_or_default();
        tracing::warn!(bridge = %record.bridge, pid = process.pid(), log = last, "DHCP and DNS ended; starting them again");
        since = Instant::now();
        match driver.start_dnsmasq(&record).await {
            Ok(new) => {
                live.dnsmasq = Some(new.clone());
                process = new;
            }
            Err(e) => {
                // The dead process stays the one to watch: it "ends" at once and the next try follows, later.
                tracing::error!(bridge = %record.bridge, error = %e, context = e.context, "DHCP and DNS could not be started");
            }
        }
    }
}

async fn watch_firewall(inner: Weak<Inner>, mut watch: nft::Watch) {
    loop {
        if let Err(e) = watch.changed(QUIET).await {
            tracing::error!(error = %e, "changes of the firewall can not be watched");
            return;
        }
        let Some(inner) = inner.upgrade() else { return };
        let mut firewall = inner.firewall.lock().await;
        if let Err(e) = firewall.reconcile(&inner.daemon, &inner.paths).await {
            tracing::error!(error = %e, context = e.context, "the firewall could not be repaired");
        }
    }
}
