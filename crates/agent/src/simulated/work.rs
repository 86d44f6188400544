//! What the calls of the simulated host do.

use super::{
    SimulatedAgent,
    session::{Session, SessionKind},
    state::{Guest, Image, Network, State, Volume},
    storage::Held,
};
use crate::{acl_logs::AclLogRead, asks::GuestAsk, calls::*, displays::DisplayGuardSet, outputs::*};
use karst_model::{
    ByteSize, Config, Error, InstanceId, NetworkId, PoolId, Result, SessionId,
    device::{PortEnd, interface_name},
    display::{DisplayGuard, DisplayProtocol},
    guest::{AskedBy, FileKind, GuestWish, Observed, StopMode},
    image::{DiskFormat, ImageFacts},
    instance::{ExitReason, Generation, InstanceKind, RuntimeState},
    network::Lease,
    news::Happened,
    spec::{GuestSpec, NetworkSpec, NicLink, NicSpec, VolumeSource},
    storage::VolumeContent,
};
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeSet,
    io::{Read, Seek, SeekFrom},
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

/// Those that a real host has.
const RECIPES: [&str; 4] = ["debian/12", "debian/13", "ubuntu/22.04", "ubuntu/24.04"];

const MAX_SESSIONS: usize = 512;
/// Bytes that an empty and a cloned volume use.
pub(super) const EMPTY_VOLUME: u64 = 1 << 20;

pub(super) fn no_pool(id: PoolId) -> Error {
    Error::not_found(format!("pool {id} is not on this host"))
}
pub(super) fn no_guest(id: InstanceId) -> Error {
    Error::not_found(format!("instance {id} is not on this host"))
}
pub(super) fn no_session(id: SessionId) -> Error {
    Error::not_found(format!("session {id} is over"))
}

/// For what only a running virtual machine can.
pub(super) fn demand_machine(guest: &Guest) -> Result<()> {
    if guest.spec.kind != InstanceKind::VirtualMachine {
        return Err(Error::unsupported("only virtual machines have a screen, a keyboard and a reset button"));
    }
    if !guest.runs() {
        return Err(Error::conflict(format!("instance {} is not running", guest.spec.instance)));
    }
    Ok(())
}

impl State {
    pub(super) fn volume(&self, at: VolumeRef) -> Result<&Volume> {
        if self.closed.contains(&at.pool) {
            return Err(crate::pools::closed(at.pool));
        }
        self.volumes
            .get(&at.volume)
            .filter(|v| v.spec.pool == at.pool)
            .ok_or_else(|| Error::not_found(format!("volume {} is not in pool {}", at.volume, at.pool)))
    }

    pub(super) fn used(&self, volume: &Volume) -> u64 {
        let image = match volume.spec.source {
            VolumeSource::Image { image, .. } => {
                self.images.get(&image).map_or(EMPTY_VOLUME, |i| i.facts.size)
            }
            _ => EMPTY_VOLUME,
        };
        image + volume.held.files.values().map(|f| f.data.len() as u64).sum::<u64>()
    }

    pub(super) fn pool_used(&self, pool: PoolId) -> u64 {
        let volumes = self.volumes.values().filter(|v| v.spec.pool == pool);
        volumes.map(|v| self.used(v)).sum()
    }

    /// The guest if it runs, and what is meant is not older than what runs.
    pub(super) fn running(&mut self, guest: GuestRef) -> Result<&mut Guest> {
        let g = self.guests.get_mut(&guest.instance).ok_or_else(|| no_guest(guest.instance))?;
        not_older(g, guest.generation)?;
        if !g.runs() {
            return Err(Error::conflict(format!("instance {} is not running", guest.instance)));
        }
        Ok(g)
    }

    pub(super) fn add_session(&mut self, id: SessionId, session: Session) -> Result<()> {
        if self.sessions.len() >= MAX_SESSIONS {
            self.sessions.retain(|_, s| s.exit().is_none());
        }
        if self.sessions.len() >= MAX_SESSIONS {
            session.end();
            return Err(Error::unavailable("the host has too many open sessions; close some"));
        }
        self.sessions.insert(id, session);
        Ok(())
    }
}

pub(super) fn not_older(guest: &Guest, generation: Generation) -> Result<()> {
    if guest.spec.generation > generation {
        return Err(Error::conflict(format!(
            "the host knows a newer start of instance {} than the one that is meant",
            guest.spec.instance
        )));
    }
    Ok(())
}

impl SimulatedAgent {
    pub(super) fn seconds(&self) -> i64 {
        self.env.now().as_second()
    }

    pub(super) fn check_guest(&self, state: &State, spec: &GuestSpec) -> Result<()> {
        let at = VolumeRef { pool: spec.root.pool, volume: spec.root.volume };
        let volume = state.volume(at)?;
        let wanted = match spec.kind {
            InstanceKind::Container => VolumeContent::Filesystem,
            InstanceKind::VirtualMachine => VolumeContent::Block,
        };
        if volume.spec.content != wanted {
            return Err(Error::invalid("root", format!("a {} cannot run from this volume", spec.kind)));
        }
        if let Some(other) = state.user_of(spec.root.volume).filter(|other| *other != spec.instance) {
            return Err(Error::conflict(format!("the root volume is in use by instance {other}")));
        }
        super::threads::demand(spec, self.options.cpus)?;
        for nic in &spec.nics {
            // Who runs keeps its place on a network that was stopped meanwhile.
            let stopped = nic.network().filter(|id| state.stopped_networks.contains(id));
            let has = |g: &Guest| g.runs() && g.spec.nics.iter().any(|n| n.network() == stopped);
            if stopped.is_none() || !state.guests.get(&spec.instance).is_some_and(has) {
                self.check_nic(state, nic)?;
            }
            crate::names::check_host_interface(self.options.daemon_id.as_deref(), &nic.host_interface)?;
            let taken = state.guests.values().filter(|g| g.runs() && g.spec.instance != spec.instance);
            if taken.flat_map(|g| &g.spec.nics).any(|n| n.host_interface == nic.host_interface) {
                return Err(Error::conflict(format!("interface {:?} is in use", nic.host_interface)));
            }
        }
        Ok(())
    }

    pub(super) fn start(&self, mut spec: GuestSpec) -> Result<Observed> {
        let mut state = self.settled();
        if let Some(guest) = state.guests.get(&spec.instance) {
            not_older(guest, spec.generation)?;
            if guest.runs() {
                if guest.spec.generation == spec.generation {
                    return Ok(guest.observed());
                }
                return Err(Error::conflict(format!(
                    "instance {} still runs an earlier start; stop it first",
                    spec.instance
                )));
            }
        }
        self.check_guest(&state, &spec)?;
        state.take_guest_keys(&spec, None)?;
        spec.limits.resolve_share(self.options.memory.bytes())?;
        state.forget_copies(spec.instance);
        state.demand_memory(&spec)?;
        let resume = spec.machine.as_ref().is_some_and(|m| m.resume) && spec.memory.is_none();
        if resume && !state.guests.get(&spec.instance).is_some_and(|g| g.saved) {
            return Err(Error::not_found(
                "there is no saved memory of this virtual machine; start it without",
            ));
        }
        state.forget_memory(spec.instance);
        state.next_pid += 1;
        let paused = spec.machine.as_ref().is_some_and(|m| m.paused);
        let guest = Guest {
            runner_cleared: false,
            state: if paused { RuntimeState::Paused } else { RuntimeState::Running },
            pid: 100_000 + state.next_pid,
            started: self.env.monotonic(),
            started_at: self.seconds(),
            stops_at: None,
            exit: None,
            halt: None,
            applied_spec_version: spec.spec_version,
            ignores_shutdown: state.guests.get(&spec.instance).is_some_and(|g| g.ignores_shutdown),
            refuses_update: state.guests.get(&spec.instance).is_some_and(|g| g.refuses_update),
            saved: false,
            still: false,
            display_guard: None,
            console_extra: vec![],
            console_cleared: false,
            spec,
        };
        let observed = guest.observed();
        state.guests.insert(observed.instance, guest);
        drop(state);
        self.publish(observed.clone());
        Ok(observed)
    }

    pub(super) async fn stop(&self, request: GuestStop) -> Result<Observed> {
        let GuestRef { instance, generation } = request.guest;
        let began = self.env.monotonic();
        let wait = {
            let mut state = self.settled();
            let Some(guest) = state.guests.get_mut(&instance) else {
                return Ok(stopped(request.guest));
            };
            not_older(guest, generation)?;
            if !guest.runs() {
                return Ok(guest.observed());
            }
            // Whoever takes back a start ends nothing else.
            if guest.spec.generation < generation {
                return Err(Error::not_found(format!(
                    "the start of instance {instance} that is meant never came to this host; what runs there is of an earlier one"
                )));
            }
            if request.mode != StopMode::Force && guest.state == RuntimeState::Error {
                return Err(Error::conflict(
                    "the guest is halted by an error (often a full disk) and cannot shut down; resume it or force it to stop",
                ));
            }
            if request.mode == StopMode::Save {
                state.demand_no_copy(instance)?;
            }
            let Some(guest) = state.guests.get_mut(&instance) else {
                return Ok(stopped(request.guest));
            };
            match request.mode {
                StopMode::Force => Duration::ZERO,
                StopMode::Save => {
                    demand_machine(guest)?;
                    state.begin_saving(instance, began)?;
                    self.options.memory_time
                }
                StopMode::Graceful { timeout } => {
                    if guest.ignores_shutdown || guest.state == RuntimeState::Paused {
                        timeout
                    } else {
                        let at = began + self.options.shutdown_time;
                        guest.stops_at = Some(guest.stops_at.map_or(at, |old| old.min(at)));
                        guest.state = RuntimeState::Stopping;
                        let observed = guest.observed();
                        drop(state);
                        self.publish(observed);
                        timeout.min(self.options.shutdown_time)
                    }
                }
            }
        };
        if request.mode == StopMode::Save {
            self.env.sleep(wait).await;
            let mut state = self.lock();
            state.forget_memory(instance);
            if let Some(guest) = state.guests.get_mut(&instance).filter(|g| g.runs()) {
                guest.saved = true;
            }
        }
        if matches!(request.mode, StopMode::Force | StopMode::Save) {
            self.end_guest(instance, ExitReason::Forced);
        } else {
            self.env.sleep(wait).await;
        }
        let state = self.settled();
        match state.guests.get(&instance) {
            None => Ok(stopped(request.guest)),
            Some(guest) if !guest.runs() => Ok(guest.observed()),
            Some(_) => Err(Error::timeout(format!(
                "instance {instance} did not shut down within {wait:?}; it still runs, stop it by force"
            ))),
        }
    }

    /// One that follows has followed when this answers.
    pub(super) async fn ask(&self, request: GuestAsk) -> Result<()> {
        let GuestAsk { guest: at, wish, by } = request;
        let pid = {
            let mut state = self.settled();
            let guest = state.running(at)?;
            if guest.spec.kind == InstanceKind::Container {
                if wish == GuestWish::Reboot {
                    return Err(Error::unsupported(
                        "a container is restarted; it does not boot anew by itself",
                    ));
                }
                if by == AskedBy::Agent {
                    return Err(Error::unsupported("a container has no agent; its init is asked"));
                }
            }
            if guest.state == RuntimeState::Paused && by == AskedBy::Agent {
                return Err(Error::conflict("the guest is frozen; resume it first"));
            }
            if by == AskedBy::Agent {
                guest.demand_not_halted()?;
            }
            if guest.ignores_shutdown || matches!(guest.state, RuntimeState::Paused | RuntimeState::Error) {
                return Ok(());
            }
            guest.pid
        };
        self.env.sleep(self.options.shutdown_time).await;
        let still = self.settled().guests.get(&at.instance).is_some_and(|g| g.runs() && g.pid == pid);
        match (wish, still) {
            (GuestWish::Shutdown, true) => {
                self.happens(at.instance, Happened::ShutDown);
                self.end_guest(at.instance, ExitReason::Shutdown);
            }
            (GuestWish::Reboot, true) => self.happens(at.instance, Happened::Reset),
            (_, false) => {}
        }
        Ok(())
    }

    pub(super) fn set_frozen(&self, guest: GuestRef, frozen: bool) -> Result<Observed> {
        let mut state = self.settled();
        let guest = state.running(guest)?;
        let before = guest.state;
        guest.freeze(frozen);
        let changed = guest.state != before;
        let observed = guest.observed();
        drop(state);
        if changed {
            self.publish(observed.clone());
        }
        Ok(observed)
    }

    pub(super) fn import(&self, request: &ImageImport) -> Result<ImageFacts> {
        let mut state = self.lock();
        if let Some(image) = state.images.get(&request.image) {
            return Ok(image.facts.clone());
        }
        if let Some(format) = request.disk {
            return Self::import_disk(self, &mut state, request, format);
        }
        let kind = match request.parts.as_slice() {
            [ImagePart::Unified] | [ImagePart::Metadata, ImagePart::Rootfs] => InstanceKind::Container,
            [ImagePart::Metadata, ImagePart::Disk] => InstanceKind::VirtualMachine,
            _ => {
                return Err(Error::invalid(
                    "parts",
                    "an image is one unified part, or metadata and a root file system or disk",
                ));
            }
        };
        let (mut hash, mut size, mut parts) = (Sha256::new(), 0, vec![]);
        for part in &request.parts {
            let staged = state.staged.get(&(request.image, *part));
            let mut file = staged
                .ok_or_else(|| Error::not_found(format!("no {part:?} part was uploaded")))?
                .try_clone()?;
            file.seek(SeekFrom::Start(0))?;
            let mut data = vec![];
            file.read_to_end(&mut data)?;
            if data.is_empty() || data.starts_with(b"not an image") {
                return Err(Error::invalid("image", format!("the {part:?} part is not of an image")));
            }
            hash.update(&data);
            size += data.len() as u64;
            parts.push((*part, file, data.len() as u64));
        }
        let mut facts = self.facts(&hash.finalize(), size, kind, "imported");
        if let Some((digest, application)) = parts.first().and_then(|(_, file, _)| layout(file)) {
            facts.fingerprint = digest;
            facts.application = Some(application);
        }
        for part in &request.parts {
            state.staged.remove(&(request.image, *part));
        }
        state.images.insert(request.image, Image { facts: facts.clone(), parts, held: Held::default() });
        Ok(facts)
    }

    /// A disk by itself: here a raw one is of its size, and others begin with the name of their format.
    fn import_disk(
        &self,
        state: &mut State,
        request: &ImageImport,
        format: DiskFormat,
    ) -> Result<ImageFacts> {
        if request.parts != [ImagePart::Disk] {
            return Err(Error::invalid("parts", "a disk is one part"));
        }
        let staged = state.staged.remove(&(request.image, ImagePart::Disk));
        let mut file = staged.ok_or_else(|| Error::not_found("no disk was uploaded"))?;
        file.seek(SeekFrom::Start(0))?;
        let mut data = vec![];
        file.read_to_end(&mut data)?;
        let size = data.len() as u64;
        if format != DiskFormat::Raw && !data.starts_with(format.as_str().as_bytes()) {
            return Err(Error::invalid("disk", format!("the file is not a {} disk", format.as_str())));
        }
        let kind = InstanceKind::VirtualMachine;
        let facts =
            ImageFacts { disk_size: size, ..self.facts(&Sha256::digest(&data), size, kind, "imported") };
        let metadata = super::files::content(b"metadata")?.into();
        let parts = vec![(ImagePart::Metadata, metadata, 8), (ImagePart::Disk, file, size)];
        state.images.insert(request.image, Image { facts: facts.clone(), parts, held: Held::default() });
        Ok(facts)
    }

    pub(super) fn facts(&self, hash: &[u8], size: u64, kind: InstanceKind, how: &str) -> ImageFacts {
        let properties: Config = [
            ("os", "Debian"),
            ("release", "bookworm"),
            ("architecture", "x86_64"),
            ("description", &format!("Debian bookworm ({how}, simulated)")),
        ]
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .into();
        ImageFacts {
            application: None,
            fingerprint: hash.iter().map(|b| format!("{b:02x}")).collect(),
            size,
            kind,
            architecture: "x86_64".into(),
            properties,
            created_at: self.seconds(),
            expires_at: 0,
            templates: Default::default(),
            disk_size: if kind == InstanceKind::VirtualMachine { ByteSize::gib(2).bytes() } else { 0 },
        }
    }

    pub(super) async fn build(&self, request: ImageBuild) -> Result<ImageFacts> {
        if let Some(image) = self.lock().images.get(&request.image) {
            return Ok(image.facts.clone());
        }
        if !RECIPES.contains(&request.recipe.as_str()) {
            return Err(Error::not_found(format!(
                "there is no recipe {:?}; known are {}",
                request.recipe,
                RECIPES.join(", ")
            ))
            .at("recipe"));
        }
        for (stage, percent) in [("building root file system", 0), ("packing", 90)] {
            self.events.publish(&AgentEvent::ImageProgress {
                image: request.image,
                stage: stage.into(),
                percent: Some(percent),
            });
            self.env.sleep(self.options.build_time / 2).await;
        }
        let text = format!("{} {} {}", request.image, request.recipe, request.kind);
        let data = super::files::content(text.as_bytes())?;
        let part = ImagePart::Unified;
        let facts = self.facts(&Sha256::digest(&text), text.len() as u64, request.kind, "built");
        let parts = vec![(part, data.into(), text.len() as u64)];
        let image = Image { facts: facts.clone(), parts, held: Held::default() };
        self.lock().images.insert(request.image, image);
        Ok(facts)
    }

    pub(super) fn ensure_network(&self, spec: NetworkSpec) -> Result<()> {
        interface_name("bridge", &spec.bridge)?;
        if spec.spec.raw_dnsmasq.is_some() {
            return Err(
                Error::forbidden("this host's policy does not grant raw.dnsmasq").at("config.raw.dnsmasq")
            );
        }
        let mut seen = BTreeSet::new();
        for host in &spec.hosts {
            let addresses = [host.ipv4.map(IpAddr::from), host.ipv6.map(IpAddr::from)];
            for address in addresses.into_iter().flatten() {
                if !spec.spec.takes(address) {
                    return Err(Error::invalid("hosts", format!("{address} is not an address for a guest")));
                }
                if !seen.insert(address.to_string()) {
                    return Err(Error::conflict(format!("two guests have the address {address}")));
                }
            }
            if let Some(route) = host.routes.iter().find(|r| !spec.spec.routed().any(|n| n.contains(*r))) {
                return Err(Error::invalid("hosts", format!("{route} is not within the network's routes")));
            }
            if !seen.insert(host.mac.to_ascii_lowercase()) {
                return Err(Error::conflict(format!("two guests have the MAC address {}", host.mac)));
            }
        }
        let mut state = self.lock();
        let other = state.networks.values().any(|n| n.spec.bridge == spec.bridge && n.spec.id != spec.id);
        if other || self.options.foreign_bridges.contains(&spec.bridge) {
            return Err(Error::conflict(format!(
                "interface {:?} is there already and not this network's",
                spec.bridge
            )));
        }
        let used = state
            .guests
            .values()
            .any(|g| g.runs() && g.spec.nics.iter().any(|n| n.network() == Some(spec.id)));
        if let Some(network) = state.networks.get_mut(&spec.id) {
            if network.spec.bridge != spec.bridge && used {
                return Err(Error::conflict("the bridge is in use by guests; stop them first"));
            }
            network.spec = spec;
            return Ok(());
        }
        let network = Network { spec, leases: Default::default() };
        state.stopped_networks.remove(&network.spec.id);
        state.networks.insert(network.spec.id, network);
        Ok(())
    }

    /// Each ACL of a network with a rule that logs has logged one packet by it.
    pub(super) fn acl_log(&self, request: AclLogRead) -> Result<Vec<u8>> {
        let state = self.settled();
        if state.acl_logs_removed.contains(&request.acl) {
            return Ok(vec![]);
        }
        let acls = state.networks.values().flat_map(|n| &n.spec.acls).filter(|a| a.id == request.acl);
        let mut rules = acls.flat_map(|a| {
            let ingress = a.ingress.iter().map(|r| ("ingress", r));
            ingress.chain(a.egress.iter().map(|r| ("egress", r)))
        });
        let line = rules.find(|(_, rule)| rule.logged).map(|(direction, rule)| {
            let (action, number) = (rule.action.as_str(), rule.number);
            format!(
                "{{\"time\":\"2026-01-01T00:00:00Z\",\"proto\":\"tcp\",\"src\":\"192.0.2.1\",\"dst\":\"192.0.2.2\",\
                 \"src_port\":\"40000\",\"dst_port\":\"80\",\"action\":\"{action}\",\"direction\":\"{direction}\",\
                 \"rule\":{number}}}\n"
            )
        });
        let line = line.unwrap_or_default().into_bytes();
        Ok(if line.len() > request.max as usize { vec![] } else { line })
    }

    pub(super) fn leases(&self, id: NetworkId) -> Result<Vec<Lease>> {
        let now = self.env.monotonic();
        let mut guard = self.settled();
        let state = &mut *guard;
        let network = state.networks.get_mut(&id).ok_or_else(|| no_network(id))?;
        // Renewed half way through, as clients do.
        let expiry = i64::from(network.spec.spec.dhcp_expiry);
        let expires = (expiry > 0).then(|| self.seconds() + expiry);
        let mut leases = vec![];
        let mut seen = BTreeSet::new();
        for host in &network.spec.hosts {
            if let Some(address) = host.ipv4 {
                seen.insert(host.mac.clone());
                leases.push(Lease {
                    hostname: host.hostname.clone(),
                    mac: host.mac.clone(),
                    address: address.into(),
                    fixed: true,
                    expires: None,
                });
            }
        }
        let up = |g: &&Guest| g.runs() && now.saturating_sub(g.started) >= self.options.address_after;
        for guest in state.guests.values().filter(up) {
            for nic in guest.spec.nics.iter().filter(|n| n.network() == Some(id) && !seen.contains(&n.mac)) {
                if let Some(address) = network.lease(&nic.mac, nic.ipv4) {
                    leases.push(Lease {
                        hostname: guest.spec.hostname.clone(),
                        mac: nic.mac.clone(),
                        address: address.into(),
                        fixed: nic.ipv4.is_some(),
                        expires: expires.filter(|_| nic.ipv4.is_none()),
                    });
                }
            }
        }
        Ok(leases)
    }

    /// The simulated host has one interface that it grants, `granted0`, and routes 192.0.2.0/24.
    fn check_nic(&self, state: &State, nic: &NicSpec) -> Result<()> {
        let field = |key: &str| format!("devices.{}.{key}", nic.name);
        let granted = |name: &str| self.link_state_of(name).map(drop).map_err(|e| e.at(field("parent")));
        let routed = |net: &ipnet::IpNet, key: &str| {
            let family = if net.addr().is_ipv4() { "ipv4" } else { "ipv6" };
            match ipnet::IpNet::from(ipnet::Ipv4Net::new_assert(Ipv4Addr::new(192, 0, 2, 0), 24))
                .contains(net)
            {
                true => Ok(()),
                false => Err(Error::forbidden(format!("this host's policy does not grant {net}"))
                    .at(field(&format!("{family}.{key}")))),
            }
        };
        match &nic.link {
            NicLink::Network(id) if state.networks.contains_key(id) => Ok(()),
            NicLink::Network(id) => Err(Error::not_found(format!("network {id} is not on this host"))),
            NicLink::Bridge(name) => granted(name),
            NicLink::Macvlan(p) | NicLink::Physical(p) => granted(&p.parent),
            NicLink::User {} => Ok(()),
            NicLink::PointToPoint(routes) => routes.iter().try_for_each(|r| routed(r, "routes")),
            NicLink::Routed { link, routes } => {
                link.parent.iter().try_for_each(|p| granted(&p.parent))?;
                link.addresses.iter().try_for_each(|a| routed(&(*a).into(), "address"))?;
                routes.iter().try_for_each(|r| routed(r, "routes"))
            }
        }
    }

    pub(super) fn link_state_of(&self, name: &str) -> Result<NetworkState> {
        match name {
            "granted0" => Ok(NetworkState {
                mac: "10:66:6a:00:00:02".into(),
                mtu: 1500,
                up: true,
                ..NetworkState::default()
            }),
            _ => Err(Error::forbidden(format!("this host's policy does not grant the interface {name:?}"))),
        }
    }

    pub(super) fn network(&self, id: NetworkId) -> Result<NetworkState> {
        let state = self.settled();
        let network = state.networks.get(&id).ok_or_else(|| no_network(id))?;
        let ports = state.guests.values().filter(|g| g.runs()).flat_map(|g| &g.spec.nics);
        Ok(NetworkState {
            mac: "10:66:6a:00:00:01".into(),
            mtu: network.spec.spec.mtu.unwrap_or(1500),
            up: true,
            addresses: network
                .spec
                .spec
                .ipv4
                .iter()
                .map(|n| (n.addr().into(), n.prefix_len(), "global".into()))
                .collect(),
            counters: [0; 4],
            ports: ports.filter(|n| n.network() == Some(id)).map(|n| n.host_interface.clone()).collect(),
        })
    }

    pub(super) fn exec(&self, request: ExecStart) -> Result<WithFds<SessionId>> {
        let mut state = self.settled();
        let guest = state.guests.get(&request.instance).ok_or_else(|| no_guest(request.instance))?;
        if guest.state != RuntimeState::Running {
            let text = format!("instance {} is not running, or is frozen", request.instance);
            return Err(Error::conflict(text));
        }
        if request.request.command.is_empty() {
            return Err(Error::invalid("command", "no program to run"));
        }
        let (session, fds) = Session::exec(request.instance, &guest.spec.hostname, request.request)?;
        let id = SessionId(self.env.uuid());
        state.add_session(id, session)?;
        // A program of a simulated machine writes all over its disks.
        for reached in state.reach_thresholds(request.instance) {
            self.events.publish(&AgentEvent::DiskThreshold { reached });
        }
        Ok(WithFds { value: id, fds })
    }

    pub(super) fn keep_output(&self, output: ExecOutput) -> Result<WithFds<SessionId>> {
        let mut state = self.settled();
        state.guests.get(&output.instance).ok_or_else(|| no_guest(output.instance))?;
        let of_guest: Vec<_> =
            state.outputs.keys().filter(|o| o.instance == output.instance).copied().collect();
        for old in of_guest.iter().take((of_guest.len() + 1).saturating_sub(OUTPUTS)) {
            state.outputs.remove(old);
        }
        state.outputs.insert(output, vec![]);
        let states = self.state.clone();
        let commit = move |mut data: Vec<u8>| {
            data.truncate(OUTPUT_BYTES as usize);
            if let Some(kept) = states.lock().unwrap().outputs.get_mut(&output) {
                *kept = data;
            }
            Ok(())
        };
        let (session, fd) = Session::file_write(output.instance, commit)?;
        let id = SessionId(self.env.uuid());
        state.add_session(id, session)?;
        Ok(WithFds { value: id, fds: vec![fd] })
    }

    /// The console, or a port, where what is typed comes back too.
    pub(super) fn console(&self, request: ConsoleAttach, port: Option<String>) -> Result<WithFds<SessionId>> {
        let mut state = self.settled();
        let guest = state.guests.get(&request.instance).ok_or_else(|| no_guest(request.instance))?;
        if !guest.runs() {
            return Err(Error::conflict(format!("instance {} is not running", request.instance)));
        }
        if let Some(name) = &port {
            demand_machine(guest)?;
            let mut lines = guest.spec.machine.iter().flat_map(|m| &m.lines);
            match lines.find(|l| l.name == *name).map(|l| &l.device.to) {
                Some(PortEnd::Stream {}) => {}
                Some(_) => return Err(Error::unsupported(format!("the port {name:?} leads elsewhere"))),
                None => return Err(Error::not_found(format!("the machine has no port {name:?}")).at("port")),
            }
        }
        let attached = |s: &&Session| {
            let same = s.kind == SessionKind::Console && s.port == port;
            same && s.instance == request.instance && s.exit().is_none()
        };
        if let Some(old) = state.sessions.values().find(attached) {
            if !request.force {
                return Err(Error::conflict("somebody is attached to this console; force ends that"));
            }
            old.end();
        }
        let (states, instance) = (self.state.clone(), request.instance);
        let own = port.is_none();
        let log = move |typed: &[u8]| {
            if own && let Some(guest) = states.lock().unwrap().guests.get_mut(&instance) {
                guest.console_extra.extend_from_slice(typed);
                let surplus = guest.console_extra.len().saturating_sub(64 << 10);
                guest.console_extra.drain(..surplus);
            }
        };
        let (mut session, fd) = Session::console(request.instance, log)?;
        session.port = port;
        let id = SessionId(self.env.uuid());
        state.add_session(id, session)?;
        Ok(WithFds { value: id, fds: vec![fd] })
    }

    /// Keeps what viewers have to know, as QEMU does.
    pub(super) fn guard_display(&self, request: DisplayGuardSet) -> Result<()> {
        let mut state = self.settled();
        let guest = state.guests.get_mut(&request.instance).ok_or_else(|| no_guest(request.instance))?;
        demand_machine(guest)?;
        guest.display_guard = request.guard;
        Ok(())
    }

    /// A display that says what a server of its protocol says first, and echoes.
    pub(super) fn display(
        &self,
        instance: InstanceId,
        protocol: DisplayProtocol,
        guard: Option<DisplayGuard>,
    ) -> Result<WithFds<SessionId>> {
        let state = self.settled();
        let guest = state.guests.get(&instance).ok_or_else(|| no_guest(instance))?;
        demand_machine(guest)?;
        if protocol == DisplayProtocol::Spice && !guest.spec.machine.as_ref().is_some_and(|m| m.spice) {
            return Err(Error::unsupported(
                "the virtual machine was started without SPICE; set hardware.spice=true and start it anew",
            ));
        }
        drop(state);
        let guarded = guard.is_some();
        if guarded {
            self.guard_display(DisplayGuardSet { instance, guard })?;
        }
        let mut state = self.settled();
        let (session, fd) = match protocol {
            DisplayProtocol::Vnc => Session::display(instance, guarded)?,
            DisplayProtocol::Spice => Session::spice(instance)?,
        };
        let id = SessionId(self.env.uuid());
        state.add_session(id, session)?;
        Ok(WithFds { value: id, fds: vec![fd] })
    }

    pub(super) fn write(&self, request: FileWriteRequest) -> Result<WithFds<Option<SessionId>>> {
        let FileWriteRequest { file, write } = request;
        let now = self.seconds();
        let mut state = self.settled();
        state.may_write(&file, &write)?;
        if write.kind != FileKind::File {
            state.write_file(&file, &write, vec![], now)?;
            return Ok(WithFds { value: None, fds: vec![] });
        }
        let states = self.state.clone();
        let instance = file.instance;
        let commit = move |data| states.lock().unwrap().write_file(&file, &write, data, now);
        let (session, fd) = Session::file_write(instance, commit)?;
        let id = SessionId(self.env.uuid());
        state.add_session(id, session)?;
        Ok(WithFds { value: Some(id), fds: vec![fd] })
    }

    pub(super) fn check(&self) -> SelfCheck {
        let state = self.settled();
        let mut leaks = vec![];
        for volume in state.volumes.values() {
            if !state.pools.contains_key(&volume.spec.pool) {
                leaks.push(format!("volume {} of a pool that is gone", volume.spec.id));
            }
        }
        for guest in state.guests.values().filter(|g| g.still && g.runs()) {
            leaks.push(format!("file systems of guest {} are still", guest.spec.instance));
        }
        leaks.extend(state.copies_that_go_on());
        leaks.extend(state.memory_that_is_written());
        leaks.extend(state.staged_backups.keys().map(|id| format!("staged backup {id}")));
        let live = state.sessions.values().filter(|s| s.exit().is_none()).count();
        let open = state.volumes.iter().filter(|(_, v)| !state.closed.contains(&v.spec.pool));
        SelfCheck {
            volumes: open.clone().map(|(id, _)| *id).collect(),
            snapshots: open.flat_map(|(id, v)| v.snapshots.keys().map(|s| (*id, *s))).collect(),
            backups: state.backups.keys().copied().collect(),
            images: state.images.keys().copied().collect(),
            networks: state.networks.keys().copied().collect(),
            guests: state.guests.keys().chain(&state.arrived).copied().collect(),
            machine_states: state.machine_states.keys().copied().collect(),
            sessions: live as u32,
            leaks,
        }
    }
}

pub(super) fn no_network(id: NetworkId) -> Error {
    Error::not_found(format!("network {id} is not on this host"))
}

pub(super) fn stopped(guest: GuestRef) -> Observed {
    Observed::never_ran(guest.instance, guest.generation)
}

/// Digest of the manifest of an archive of an OCI layout whose first two files are `oci-layout` and a short `index.json`, and a
/// program, whatever its image says.
fn layout(file: &std::fs::File) -> Option<(String, karst_model::image::Application)> {
    let mut file = file;
    file.seek(SeekFrom::Start(0)).ok()?;
    let mut head = vec![0; 2048];
    file.read_exact(&mut head).ok()?;
    if !head.starts_with(b"oci-layout\0") || !head[1024..].starts_with(b"index.json\0") {
        return None;
    }
    let text = String::from_utf8_lossy(&head[1536..]).into_owned();
    let digest = text.split("sha256:").nth(1)?.get(..64)?.to_owned();
    let application = karst_model::image::Application {
        command: vec!["/bin/server".into(), "--port=80".into()],
        cwd: "/srv".into(),
        uid: 101,
        gid: 101,
        environment: [("PATH".to_owned(), "/bin".to_owned())].into(),
        stop_signal: None,
    };
    Some((digest, application))
}
