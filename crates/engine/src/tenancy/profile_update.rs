//! Changing a profile: for all who have it, or for none.
//!
//! Each user is asked what a change of that instance itself would be asked. Those that run get it at once: devices come and go,
//! roots grow, and what of the configuration can change live does. When one of them cannot take a device while it runs, nobody
//! gets anything.

use super::{
    limits::{self, Planned, admit},
    profile_uses,
};
use crate::{
    EngineInner, Records,
    compute::{
        called,
        create::networks_of,
        disks::check_disks,
        expand::{self, ParsedDevices},
        nic_checks::demand_own,
        run::{as_run, of_run_only, over_flat},
        update::{check_root, limit_again},
    },
    db::Tx,
    network::life::demand_active_for,
    saga::{Saga, StepContext},
};
use async_trait::async_trait;
use karst_agent::{VolumeRef, VolumeResize};
use karst_model::{
    ByteSize, Error, ErrorKind, InstanceId, NetworkId, NodeId, Result, VolumeId,
    applied::AppliedSpec,
    device::{Devices, DiskOrigin},
    guest::Applied,
    instance::{DeviceIdentity, Generation, Instance},
    keys,
    profile::Profile,
    spec::GuestSpec,
    storage::Volume,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

/// Time for a change of one running guest.
const APPLY: Duration = Duration::from_secs(180);
/// How long a user of the profile may stay busy.
const SETTLE: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(50);
/// Records that one transaction changes.
const AT_ONCE: usize = 40;

type Identities = BTreeMap<String, DeviceIdentity>;
/// What devices were known by before, of those for which that changes; `None` of those that are new.
type Had = BTreeMap<String, Option<DeviceIdentity>>;

/// Every user stays valid with the profile as it is to be, and every project of theirs within its limits; `tx` holds as
/// long as that is so.
pub(super) fn demand_valid(
    engine: &EngineInner,
    records: &Records,
    tx: &mut Tx,
    profile: &Profile,
) -> Result<()> {
    let mut projects = BTreeSet::from([profile.project]);
    let mut taken = BTreeMap::new();
    for instance in records.instances.values().filter(|i| i.profiles.contains(&profile.id)) {
        demand_valid_user(engine, records, tx, instance, profile, &mut taken).map_err(|e| Error {
            message: format!("{} would be invalid: {}", called(profile.project, instance), e.message),
            ..e
        })?;
        projects.insert(instance.project);
    }
    for project in projects {
        admit(records, tx, project, &Planned { profile: Some(profile), ..Default::default() })?;
    }
    tx.expect_untouched(records, &profile_uses(profile.id));
    Ok(())
}

/// An instance with what its profiles say written into itself, so that it can be asked what any instance is asked; with one of
/// them as it is to be.
fn flat(
    engine: &EngineInner,
    records: &Records,
    instance: &Instance,
    changed: Option<&Profile>,
) -> Result<(Instance, ParsedDevices)> {
    let (config, devices) = limits::expanded(records, instance, changed);
    let parsed = expand::parse_devices(&devices)?;
    let mut flat = instance.clone();
    let run = records.runtimes.get(&instance.id).and_then(|r| r.applied.as_ref());
    flat.identities = engine.assign_beside(
        records,
        (&instance.identities, &of_run_only(run, instance, &devices)),
        &parsed,
        instance.hardware.as_ref(),
        instance.root,
    );
    (flat.config, flat.devices, flat.profiles) = (config, devices, vec![]);
    Ok((flat, parsed))
}

fn demand_valid_user(
    engine: &EngineInner,
    records: &Records,
    tx: &mut Tx,
    instance: &Instance,
    changed: &Profile,
    taken: &mut BTreeMap<VolumeId, InstanceId>,
) -> Result<()> {
    let (after, parsed) = flat(engine, records, instance, Some(changed))?;
    keys::limits(&after.config)?;
    let before = records.expanded(instance).1;
    if before != after.devices {
        let (device, root) = &parsed.root;
        let changed_disks = disks_of_change(&parsed, &before, &after.devices);
        check_disks(records, tx, instance, &changed_disks)?;
        if records.pool(&root.pool)?.id != instance.pool {
            return Err(Error::conflict(format!("it would change its pool by device {device:?}"))
                .at(format!("devices.{device}.pool")));
        }
        if before.get(device) != after.devices.get(device) {
            let grown = check_root(records, instance, &parsed)?;
            crate::storage::use_pools(records, tx, grown.iter().map(|volume| volume.pool))?;
        }
        demand_unshared(records, instance, &changed_disks, taken)?;
        // Of the record: in what is flat, all is the instance's own.
        demand_own(instance, &parsed)?;
        engine.check_nics_besides(records, tx, &after, &parsed, Some(changed.id))?;
    }
    let whole = |i: &Instance| {
        keys::check(&i.config, Some(i.kind)).and_then(|()| engine.guest_spec(records, i, 0).map(drop))
    };
    match whole(&after) {
        // What it could not be started with before either is no fault of this change.
        Err(e) if flat(engine, records, instance, None).is_ok_and(|(now, _)| whole(&now).is_ok()) => Err(e),
        _ => Ok(()),
    }
}

/// The disks of a change, and those with the same volume as one of them. The others were asked when they came: with many users that
/// have volumes of their own, a transaction has no room to expect all of these, and one that is at work stops nobody.
pub(crate) fn disks_of_change(parsed: &ParsedDevices, before: &Devices, after: &Devices) -> ParsedDevices {
    let changed = |name: &String| before.get(name) != after.get(name);
    let disks = parsed.disks.iter().filter(|(name, _)| changed(name)).map(|(_, disk)| &disk.source);
    let mut sources: Vec<DiskOrigin> = disks.cloned().collect();
    let (name, root) = &parsed.root;
    let custom = root.source.clone().map(|volume| DiskOrigin::Volume { pool: root.pool.clone(), volume });
    sources.extend(custom.clone().filter(|_| changed(name)));
    let mut of_change = parsed.clone();
    of_change.root.1.source.take_if(|_| custom.is_some_and(|custom| !sources.contains(&custom)));
    of_change.disks.retain(|(_, disk)| sources.contains(&disk.source));
    of_change.kernel = parsed.kernel.clone().filter(|(name, _)| changed(name));
    of_change
}

/// A block volume of a profile is one user's, unless it says that it may be several.
fn demand_unshared(
    records: &Records,
    instance: &Instance,
    parsed: &ParsedDevices,
    taken: &mut BTreeMap<VolumeId, InstanceId>,
) -> Result<()> {
    for (device, disk) in &parsed.disks {
        let DiskOrigin::Volume { pool, volume } = &disk.source else { continue };
        let Some(row) = records.custom_volume(instance.project, pool, volume).filter(|v| !v.is_shared())
        else {
            continue;
        };
        if taken.insert(row.id, instance.id).is_some_and(|other| other != instance.id) {
            return Err(Error::conflict(format!(
                "block volume {volume:?} would be attached to another user of the profile too; set security.shared=true \
                 on it if what is in it may be used by several at once"
            ))
            .at(format!("devices.{device}.source")));
        }
    }
    Ok(())
}

/// Plan of [`ProfileUpdate`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProfilePlan {
    /// As it is to be.
    pub(super) profile: Profile,
    pub(super) path: String,
}

/// Outputs of [`ProfileUpdate`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ProfileOutputs {
    /// What running users knew their devices by, where that changes. It is known before it changes: afterwards nobody could
    /// tell what a guest has from what it is to have.
    had: Vec<(InstanceId, Had)>,
    /// Roots that grow, with their sizes before.
    roots: Vec<(VolumeId, Option<ByteSize>)>,
}

/// Changes a profile and what its running users have of it. The profile's lock keeps users from changing and from coming;
/// the first step waits for those who were at it before. So what each had and is to have can be computed from the
/// records at any time, and the plan stays small however many there are.
pub struct ProfileUpdate;

/// A running user: where, what it has, what it is to have.
struct User {
    /// For errors.
    name: String,
    node: NodeId,
    before: GuestSpec,
    after: GuestSpec,
    /// The same as records, with the profiles written in.
    flat: [Instance; 2],
    /// What it is to be for its networks: with the NICs that only its run has.
    on_networks: Instance,
}

fn in_use(run: Option<&AppliedSpec>, flat: &Instance, known: &Identities) -> Instance {
    let Some(run) = run.filter(|run| !run.held.is_empty()) else { return flat.clone() };
    let identities = over_flat(Some(run), flat, known).identities;
    as_run(flat, flat.config.clone(), run.in_use(&flat.devices), identities)
}

impl User {
    /// Names of devices that it gets, gives back or has otherwise than before.
    fn devices(&self) -> BTreeSet<&String> {
        let [before, after] = self.flat.each_ref().map(|i| &i.devices);
        before.keys().chain(after.keys()).filter(|name| before.get(*name) != after.get(*name)).collect()
    }

    fn is_changed(&self) -> bool {
        let [before, after] = &self.flat;
        self.before != self.after || before.devices != after.devices || before.config != after.config
    }

    /// A device of the change that the host left for the next start.
    fn left(&self, applied: &Applied) -> Option<&String> {
        let keys = |name: &str| self.flat.iter().rev().find_map(|i| i.devices.get(name));
        let is = |name: &str, kind: &str| keys(name).and_then(|k| k.get("type")).is_some_and(|t| t == kind);
        self.devices().into_iter().find(|name| {
            applied.pending.iter().any(|pending| match pending.as_str() {
                // Of rates of disks, where the kernel has no place for them any more.
                "devices" => is(name, "disk"),
                "devices.tpm" if is(name, "tpm") => true,
                other => other.strip_prefix("devices.") == Some(name.as_str()),
            })
        })
    }
}

fn running_users(engine: &EngineInner, profile: &Profile, had: &[(InstanceId, Had)]) -> Result<Vec<User>> {
    let records = engine.inventory.read();
    let mut users = vec![];
    for instance in records.instances.values().filter(|i| i.profiles.contains(&profile.id)) {
        let runtime = records.runtimes.get(&instance.id);
        let status = instance.status(runtime.map(|r| &r.value));
        // A guest of which its host can say nothing cannot be changed now; it takes the change with its next start.
        let Some(runtime) = runtime.filter(|_| status.is_up()) else { continue };
        if matches!(runtime.halt, Some(karst_model::instance::HaltReason::Unknown { .. })) {
            continue;
        }
        let name = called(profile.project, instance);
        let named = |e: Error| Error { message: format!("{name}: {}", e.message), ..e };
        let (generation, domain) = (runtime.generation, runtime.domain_id.unwrap_or(0));
        let spec = |i: &Instance| -> Result<GuestSpec> {
            Ok(GuestSpec { generation, ..engine.guest_spec(&records, i, domain)? })
        };
        let mut now = instance.value.clone();
        if let Some((_, had)) = had.iter().find(|(id, _)| *id == instance.id) {
            put_back(&mut now.identities, had);
        }
        let before = flat(engine, &records, &now, None).map_err(named)?.0;
        let after = flat(engine, &records, instance, Some(profile)).map_err(named)?.0;
        // What a run holds apart from its definition is none of a profile's.
        let run = runtime.applied.as_ref();
        users.push(User {
            node: instance.node,
            before: spec(&over_flat(run, &before, &now.identities)).map_err(named)?,
            after: spec(&over_flat(run, &after, &instance.identities)).map_err(named)?,
            on_networks: in_use(run, &after, &instance.identities),
            flat: [before, after],
            name,
        });
    }
    Ok(users)
}

/// Waits for users who are at something.
async fn settle(cx: &StepContext, profile: &Profile) -> Result<()> {
    let engine = &cx.engine;
    let mut left = SETTLE;
    loop {
        let busy = {
            let records = engine.inventory.read();
            let mut users = records.instances.values().filter(|i| i.profiles.contains(&profile.id));
            users.find_map(|i| {
                let lock = records.lock(&crate::compute::lock(i.id))?;
                Some((called(profile.project, i), lock.description.to_lowercase()))
            })
        };
        let Some((name, what)) = busy else { return Ok(()) };
        left = left.saturating_sub(LOOK);
        if left.is_zero() {
            return Err(Error::conflict(format!(
                "{name}, which has this profile, is busy ({what}); try again when it is not"
            )));
        }
        engine.env.sleep(LOOK).await;
    }
}

/// What running users are to know their devices by, those that are to come included, so that a device is the same one whenever
/// it is asked for. What a guest still has keeps what it is known by until the next start. Users for whom that is as it was are
/// left out.
fn identities(
    engine: &EngineInner,
    profile: &Profile,
    had: &[(InstanceId, Had)],
) -> Result<Vec<(Instance, Identities)>> {
    let mut all = vec![];
    for user in running_users(engine, profile, had)? {
        let [before, after] = user.flat;
        let now = engine.instance_row(after.id)?;
        let mut identities = after.identities;
        for (name, identity) in before.identities.iter().chain(&now.identities) {
            identities.entry(name.clone()).or_insert_with(|| identity.clone());
        }
        if identities != now.identities {
            all.push((now.value.clone(), identities));
        }
    }
    Ok(all)
}

fn had(now: &Identities, then: &Identities) -> Had {
    let changed = then.iter().filter(|(name, identity)| now.get(*name) != Some(*identity));
    changed.map(|(name, _)| (name.clone(), now.get(name).cloned())).collect()
}

fn put_back(identities: &mut Identities, had: &Had) {
    for (name, was) in had {
        match was {
            Some(was) => drop(identities.insert(name.clone(), was.clone())),
            None => drop(identities.remove(name)),
        }
    }
}

async fn write(cx: &StepContext, all: &[(InstanceId, Identities)]) -> Result<()> {
    for some in all.chunks(AT_ONCE) {
        cx.engine
            .transact(|records, tx| {
                for (id, identities) in some {
                    let Some(row) = records.instances.get(id).filter(|i| i.identities != *identities) else {
                        continue;
                    };
                    tx.replace(row, &Instance { identities: identities.clone(), ..row.value.clone() });
                }
                Ok(())
            })
            .await?;
    }
    Ok(())
}

/// Roots of users that are to be larger than they are, as they are to be.
fn growing(engine: &EngineInner, profile: &Profile) -> Result<Vec<Volume>> {
    let records = engine.inventory.read();
    let mut all = vec![];
    for instance in records.instances.values().filter(|i| i.profiles.contains(&profile.id)) {
        let before = records.expanded(instance).1;
        let (after, parsed) = flat(engine, &records, instance, Some(profile))?;
        let device = &parsed.root.0;
        if before.get(device) != after.devices.get(device)
            && let Some(volume) = check_root(&records, instance, &parsed)?
        {
            all.push(volume);
        }
    }
    Ok(all)
}

/// Records the sizes of roots before they are so, in the room that their projects have, and lets them grow.
async fn grow(cx: &StepContext, profile: &Profile, roots: &[(VolumeId, Option<ByteSize>)]) -> Result<()> {
    let engine = &cx.engine;
    for volume in growing(engine, profile)? {
        engine
            .transact(|records, tx| {
                let Some(row) = records.volumes.get(&volume.id) else { return Ok(()) };
                admit(records, tx, row.project, &Planned { profile: Some(profile), ..Default::default() })?;
                tx.replace(row, &Volume { size: volume.size, ..row.value.clone() });
                Ok(())
            })
            .await?;
    }
    // Also those that are recorded by an earlier try.
    for (id, _) in roots {
        let found = {
            let records = engine.inventory.read();
            let user = records.instances.values().find(|i| i.root == *id).map(|i| i.node);
            user.zip(records.volumes.get(id).map(|v| v.value.clone()))
        };
        if let Some((node, root)) = found
            && let Some(size) = root.stored_size()
        {
            let resize = VolumeResize { volume: VolumeRef { pool: root.pool, volume: *id }, size };
            cx.agent(node)?.volume_resize(&cx.mutate(APPLY), resize).await?;
        }
    }
    Ok(())
}

/// Gives running users what they are to have: first what their NICs may send, then the devices themselves.
async fn apply(cx: &StepContext, profile: &Profile, users: &[User]) -> Result<()> {
    let engine = &cx.engine;
    {
        // Of all, before anybody gets anything.
        let records = engine.inventory.read();
        for user in users.iter().filter(|u| u.is_changed()) {
            demand_active_for(&records, &user.before, &user.after)
                .map_err(|e| Error { message: format!("{}: {}", user.name, e.message), ..e })?;
        }
    }
    for (node, ids) in networks(users) {
        let flats = users.iter().filter(|u| u.node == node && u.before.nics != u.after.nics);
        let flats: Vec<Instance> = flats.map(|u| u.on_networks.clone()).collect();
        engine.ensure_networks_for(cx, node, profile.project, &flats, &ids).await?;
    }
    for user in users.iter().filter(|u| u.is_changed()) {
        let applied = match user.before == user.after {
            // Nothing of it is the guest's business.
            true => Ok(Applied::default()),
            false => {
                let (agent, project) = (cx.agent(user.node)?, user.on_networks.project);
                crate::keys::hand_for_change(cx, &*agent, project, &user.after).await?;
                agent.guest_update(&cx.mutate(APPLY), user.after.clone()).await
            }
        };
        let applied = match applied {
            Ok(applied) => applied,
            // It ended meanwhile; the next start is with the profile as it is then.
            Err(e) if e.is(ErrorKind::NotFound) => continue,
            Err(e) => {
                let message = format!("{} refuses it: {}", user.name, e.message);
                return Err(Error { message, ..e });
            }
        };
        // Also of one that is undone: what it has is known, whatever becomes of that.
        note(engine, &user.flat[1], user.after.generation, &applied).await?;
        if let Some(device) = user.left(&applied) {
            return Err(Error::conflict(format!(
                "{} cannot take the change of device {device:?} while it runs; stop it first, or change the profile without \
                 that device",
                user.name
            ))
            .at(format!("devices.{device}")));
        }
    }
    Ok(())
}

async fn note(
    engine: &EngineInner,
    flat: &Instance,
    generation: Generation,
    applied: &Applied,
) -> Result<()> {
    engine.note_applied_profile(flat.id, generation, (&flat.config, &flat.devices), applied).await
}

/// Networks that NICs come onto, by their hosts.
fn networks(users: &[User]) -> BTreeMap<NodeId, Vec<NetworkId>> {
    let mut all: BTreeMap<NodeId, BTreeSet<NetworkId>> = BTreeMap::new();
    for user in users.iter().filter(|u| u.before.nics != u.after.nics) {
        all.entry(user.node).or_default().extend(networks_of(&user.after));
    }
    all.into_iter().map(|(node, ids)| (node, ids.into_iter().collect())).collect()
}

#[async_trait]
impl Saga for ProfileUpdate {
    const NAME: &'static str = "profile-update";
    const STEPS: &'static [&'static str] = &["settle", "identify", "apply"];
    type Plan = ProfilePlan;
    type Outputs = ProfileOutputs;

    fn locks(plan: &ProfilePlan) -> Vec<String> {
        vec![profile_uses(plan.profile.id)]
    }

    fn begin(_: &ProfilePlan, _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }

    async fn run(
        cx: &StepContext,
        plan: &ProfilePlan,
        outputs: &mut ProfileOutputs,
        step: usize,
    ) -> Result<()> {
        let (engine, profile) = (&cx.engine, &plan.profile);
        if step == 0 {
            settle(cx, profile).await?;
            // Who was busy may have changed what counts.
            demand_valid(engine, &engine.inventory.read(), &mut Tx::default(), profile)?;
            let roots = growing(engine, profile)?;
            {
                let records = engine.inventory.read();
                let size = |id: &VolumeId| records.volumes.get(id).and_then(|v| v.size);
                outputs.roots = roots.iter().map(|v| (v.id, size(&v.id))).collect();
            }
            let all = identities(engine, profile, &[])?;
            outputs.had = all.iter().map(|(now, then)| (now.id, had(&now.identities, then))).collect();
            return Ok(());
        }
        if step == 1 {
            let all = identities(engine, profile, &outputs.had)?;
            let all: Vec<_> = all.into_iter().map(|(now, then)| (now.id, then)).collect();
            return write(cx, &all).await;
        }
        demand_valid(engine, &engine.inventory.read(), &mut Tx::default(), profile)?;
        let users = running_users(engine, profile, &outputs.had)?;
        apply(cx, profile, &users).await?;
        grow(cx, profile, &outputs.roots).await
    }

    async fn undo(cx: &StepContext, plan: &ProfilePlan, outputs: &ProfileOutputs, step: usize) -> Result<()> {
        let engine = &cx.engine;
        if step < 2 {
            let all: Vec<_> = {
                let records = engine.inventory.read();
                let there = |id: &InstanceId| records.instances.get(id).map(|i| i.identities.clone());
                let was = |(id, had): &(InstanceId, Had)| {
                    let mut identities = there(id)?;
                    put_back(&mut identities, had);
                    Some((*id, identities))
                };
                outputs.had.iter().filter_map(was).collect()
            };
            return write(cx, &all).await;
        }
        let users = running_users(engine, &plan.profile, &outputs.had)?;
        for user in users.iter().filter(|u| u.is_changed()) {
            if user.before != user.after {
                let before = user.before.clone();
                let (agent, project) = (cx.agent(user.node)?, user.on_networks.project);
                crate::keys::hand_for_change(cx, &*agent, project, &before).await?;
                match agent.guest_update(&cx.mutate(APPLY), before).await {
                    Err(e) if matches!(e.kind, ErrorKind::NotFound | ErrorKind::Conflict) => continue,
                    other => note(engine, &user.flat[0], user.before.generation, &other?).await?,
                }
            } else {
                note(engine, &user.flat[0], user.before.generation, &Applied::default()).await?;
            }
        }
        for (node, ids) in networks(&users) {
            engine.ensure_networks(cx, node, &ids).await?;
        }
        // A disk that grew stays so: it cannot shrink, and the record's smaller size lets it grow again. Trees get their limits back.
        for some in outputs.roots.chunks(AT_ONCE) {
            engine
                .transact(|records, tx| {
                    for (id, size) in some {
                        if let Some(row) = records.volumes.get(id).filter(|v| v.size != *size) {
                            tx.replace(row, &Volume { size: *size, ..row.value.clone() });
                        }
                    }
                    Ok(())
                })
                .await?;
        }
        for (id, size) in &outputs.roots {
            let node = {
                let records = engine.inventory.read();
                let user = records.instances.values().find(|i| i.root == *id);
                user.filter(|_| size.is_some()).map(|i| i.node)
            };
            if let Some(node) = node {
                limit_again(cx, node, *id).await?;
            }
        }
        Ok(())
    }

    fn commit(plan: &ProfilePlan, _: &ProfileOutputs, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let records = engine.inventory.read();
        let gone = || Error::not_found("the profile is gone");
        let row = records.profiles.get(&plan.profile.id).ok_or_else(gone)?;
        demand_valid(engine, &records, tx, &plan.profile)?;
        tx.replace(row, &plan.profile);
        Ok(())
    }

    fn abort(_: &ProfilePlan, _: &ProfileOutputs, _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }

    fn announce(plan: &ProfilePlan) -> Vec<(&'static str, String)> {
        vec![("profile-updated", plan.path.clone())]
    }
}
