//! Starts of containers: what is written, mounted and limited before `lxc-start` runs, and the wait until init does.

use super::{FORCE, Running, Shared, beside, lock, network};
use crate::{
    balance,
    config::{Groups, render, seccomp, seccomp_file},
    disks, guest_api,
    limits::{Place, limits},
    locks, nics,
    proc::{init_end, log_reason, new_network},
    record::Record,
    seed,
};
use karst_guest::{
    Observed, ResolvedGuest,
    keeper::{self, Console, Spec, write_private},
};
use karst_host::Program;
use karst_model::{Error, ErrorKind, Result};
use std::{
    hash::{DefaultHasher, Hash, Hasher},
    path::Path,
    sync::Arc,
    time::Duration,
};
use tokio::time::timeout;

/// How long a start may take until init's program runs.
const START: Duration = Duration::from_secs(60);

impl Shared {
    pub(super) async fn start(self: &Arc<Self>, guest: &ResolvedGuest) -> Result<Observed> {
        let dir = &guest.state_dir;
        if *dir != self.dir(guest.instance) || guest.daemon_id != self.options.daemon_id {
            return Err(Error::internal(
                "the guest could not be started",
                format!("state directory {} or daemon is not this driver's", dir.display()),
            ));
        }
        let kept = self.guest(guest.instance);
        let _changing = kept.changing.lock().await;
        let previous = Record::read(dir)?;
        if keeper::is_alive(dir) {
            if previous.as_ref().is_none_or(|r| r.generation != guest.generation) {
                return Err(Error::conflict("the guest already runs, of another start"));
            }
            let running = self.running(guest.instance).await?;
            self.watch(guest.instance, running.keeper.clone(), running.status.keeper_pid);
            return Ok(self.observed(&running));
        }
        let groups = Groups::of(&guest.daemon_id, guest.instance);
        let interfaces = guest.nics.iter().map(|n| n.host_interface.as_str());
        let before = previous.iter().flat_map(|r| &r.nics).map(|n| n.host_interface.as_str());
        self.clear(dir, &groups, interfaces.clone().chain(before)).await?;
        if let Some(previous) = &previous {
            network::clear(dir, previous).await?;
        }
        *lock(&kept.stopped) = None;
        let mut record = Record::new(guest);
        for nic in &mut record.nics {
            nic.home = nic.spec.as_ref().map(nics::home).transpose()?.flatten();
        }
        record.seed = seed_hash(guest);
        let outcome = self.start_new(guest, &groups, &record, previous.as_ref()).await;
        match outcome {
            Ok(running) => {
                *lock(&kept.sampled) = None;
                if let Err(e) = self.start_proxies(&running, &running.record.proxies).await {
                    let _ = self.stop_force(&running).await;
                    keeper::wait_gone(dir).await?;
                    self.clear(dir, &groups, interfaces).await?;
                    network::clear(dir, &record).await?;
                    return Err(e);
                }
                self.watch(guest.instance, running.keeper.clone(), running.status.keeper_pid);
                Ok(self.observed(&running))
            }
            Err(e) => {
                keeper::wait_gone(dir).await?;
                *lock(&kept.root) = None;
                self.clear(dir, &groups, interfaces).await?;
                network::clear(dir, &record).await?;
                Err(e)
            }
        }
    }

    async fn start_new(
        &self,
        guest: &ResolvedGuest,
        groups: &Groups,
        record: &Record,
        previous: Option<&Record>,
    ) -> Result<Running> {
        let dir = &guest.state_dir;
        let containers = lock(&self.guests).len() + 1;
        // It may have to wait for another daemon.
        let made = tokio::task::spawn_blocking(move || crate::room::make(containers)).await;
        made.map_err(|e| Error::internal("raising a limit was broken off", e))?;
        if self.host.apparmor {
            let privileged = guest.security.privileged;
            let loaded = &self.profiles[usize::from(privileged)];
            loaded.get_or_try_init(|| crate::apparmor::load(&guest.daemon_id, privileged)).await?;
        }
        let config = dir.join("lxc.conf");
        let log = dir.join("lxc.log");
        let (rendered, place) = (render(guest, self.host)?, dir.clone());
        let filter = seccomp(&guest.security.denied_calls);
        // Beside what follows: neither needs the other.
        let written = tokio::task::spawn_blocking(move || {
            write_unless_same(&place.join("lxc.conf"), rendered.as_bytes())?;
            write_unless_same(&seccomp_file(&place), filter.as_bytes())?;
            locks::prepare(&place)?;
            write_private(&place.join("lxc.log"), b"")
        });
        let first = previous.is_none_or(|p| p.seed != record.seed);
        if first || !guest.files.is_empty() {
            seed::apply(guest, previous.map(|p| p.hostname.as_str()), first).await?;
        }
        let listener =
            guest.security.guest_api.as_ref().map(|api| guest_api::prepare(guest, api)).transpose()?;
        let mut mounted = disks::wanted(guest)?;
        // Where the controller of disks' rates has a hierarchy of its own (v1), limits do not reach groups below: the
        // container has none there.
        let rates = self.cgroups.io_alone();
        let (resolved, hide) = (guest.clone(), rates.clone());
        let prepared = tokio::task::spawn_blocking(move || {
            let (namespace, root) = disks::namespace(&resolved, &mut mounted, hide.as_deref())?;
            Ok::<_, Error>((mounted, namespace, root))
        });
        let (mounted, namespace, root) =
            prepared.await.map_err(|e| Error::internal("mounting was broken off", e))??;
        *lock(&self.guest(guest.instance).root) = root;
        let place = Place::of(&guest.limits)?;
        let limits = limits(guest, &place);
        // With rates it stays ours: they hold for one group and not for those below.
        let free = rates.as_ref().filter(|_| guest.security.nesting && limits.io.is_empty());
        let record = &Record { disks: mounted, free_rates: free.is_some(), ..record.clone() };
        record.write(dir)?;
        balance::note(dir, &place)?;
        self.cgroups.create(&groups.limits)?;
        self.cgroups.limit(&groups.limits, &limits)?;
        self.balancer.wake();
        if let Some(mount) = free {
            beside::free_rates(mount, groups, guest.inside())?;
        }
        self.cgroups.delegate(&groups.limits);
        let keeper_cgroups = self.cgroups.create_tracking(&groups.keeper)?;
        written.await.map_err(|e| Error::internal("writing was broken off", e))??;

        let mut argv: Vec<std::ffi::OsString> = vec!["lxc-start".into(), "-F".into(), "-n".into()];
        argv.push(guest.instance.to_string().into());
        for (option, value) in [("-P", dir), ("-f", &config), ("-o", &log)] {
            argv.extend([option.into(), value.as_os_str().to_owned()]);
        }
        // INFO tells how init ended, which the exit code does not (`proc::init_end`).
        argv.extend(["-l".into(), "INFO".into()]);
        if let Some(application) = &guest.application {
            argv.push("--".into());
            argv.extend(application.program.command.iter().map(Into::into));
        }
        let spec = Spec {
            daemon: guest.daemon_id.clone(),
            instance: guest.instance.to_string(),
            generation: (guest.generation.incarnation, guest.generation.n),
            program: Program::LxcStart.path()?,
            argv,
            env: vec![
                // All it looks for is AppArmor's parser, in sbin. Finding `newuidmap`, which lies in bin, it would insist on
                // ranges that /etc/subuid gives to root, and ours are kept apart from all of those.
                ("PATH".into(), "/usr/sbin:/sbin".into()),
                ("LC_ALL".into(), "C.UTF-8".into()),
                ("TERM".into(), "linux".into()),
            ],
            keeper_cgroups,
            cgroups: rates.iter().map(|mount| mount.join(&groups.limits)).collect(),
            mount_namespace: true,
            console: Console::Pty,
            kill_writes: self
                .cgroups
                .freezer(&groups.limits, false)
                .map(|(file, value)| (file, value.to_owned()))
                .into_iter()
                .collect(),
            ..Spec::default()
        };
        // The server starts beside the container: until it serves, who connects waits.
        let serving = async {
            match listener {
                Some(listener) => guest_api::start(&self.place(dir, record, groups), listener).await,
                None => Ok(()),
            }
        };
        let (keeper, serving) = tokio::join!(keeper::launch(dir, &spec, vec![namespace]), serving);
        let keeper = keeper?;
        if let Err(e) = serving {
            let _ = keeper.kill().await;
            let _ = timeout(FORCE, keeper.wait_exit()).await;
            return Err(e);
        }
        let status = keeper.status().await;
        let running = |status| Running {
            dir: dir.clone(),
            record: record.clone(),
            groups: groups.clone(),
            cgroups: self.cgroups.clone(),
            keeper: keeper.clone(),
            status,
        };
        let waiting = async {
            let running = running(status?);
            let mut missing = record.nics.iter().any(|n| n.plugged);
            // Nothing tells that a process has executed its program; the set-up takes about 20 ms.
            while missing || running.init().is_none() {
                if missing && let Some((_, namespace)) = running.status.pid.and_then(new_network) {
                    network::plug(dir, record, namespace).await?;
                    missing = false;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            for nic in record.nics.iter().filter(|n| !n.plugged).filter_map(|n| n.spec.as_ref()) {
                nics::settle(nic)?;
            }
            Ok::<_, Error>(running)
        };
        let e = tokio::select! {
            started = timeout(START, waiting) => match started {
                Ok(Ok(running)) => return Ok(running),
                // Gone again already: below.
                Ok(Err(e)) if e.is(ErrorKind::NotFound) => None,
                Ok(Err(e)) => Some(e),
                Err(_) => Some(Error::timeout("the container's init did not start in time")),
            },
            _ = keeper.wait_exit() => None,
        };
        if let Some(e) = e {
            let _ = keeper.kill().await;
            let _ = timeout(FORCE, keeper.wait_exit()).await;
            return Err(e);
        }
        let output = keeper::read_status(dir).map(|s| s.output).unwrap_or_default();
        let ended = || match (&guest.application, init_end(&log)) {
            (Some(_), Some(end)) => format!("its program ended at once ({end}); its console log says more"),
            (Some(_), None) => "its program ended at once; set oci.entrypoint to one that stays".to_owned(),
            _ => "the container ended while it started".to_owned(),
        };
        let reason = log_reason(&log).unwrap_or_else(ended);
        Err(Error::new(ErrorKind::Conflict, format!("the container could not be started: {reason}"))
            .with_context(output))
    }
}

/// Writes a file that is mostly the same at each start.
fn write_unless_same(path: &Path, content: &[u8]) -> Result<()> {
    if std::fs::read(path).is_ok_and(|old| old == content) {
        return Ok(());
    }
    write_private(path, content)
}

/// Tells whether the first-boot data must be written again.
fn seed_hash(guest: &ResolvedGuest) -> u64 {
    let mut h = DefaultHasher::new();
    let c = &guest.cloud_init;
    (&guest.hostname, &c.instance_id, &c.user_data, &c.vendor_data, &c.network_config).hash(&mut h);
    guest.root.path.hash(&mut h);
    guest.application.as_ref().map(|a| (&a.nameservers, &a.search, &a.addresses)).hash(&mut h);
    h.finish()
}
