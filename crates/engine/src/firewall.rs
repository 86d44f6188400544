//! Network ACLs, address sets and forwards: the use cases, and what of them a host gets.
//!
//! Like networks they belong to the default project, or to one that has networks of its own. A change writes the record, then brings the
//! networks that it concerns up to date before it answers; where the host does not answer, the reconciler of networks does
//! so later.

use crate::{
    Engine, EngineInner, Records, Row,
    context::Context,
    db::Tx,
    inventory::Uses,
    storage::{UsedBy, users_in_words},
    visible::no_acl,
};
use karst_agent::{ACL_LOG_BYTES, AclLogRead, CallContext};
use karst_model::{
    AclId, AddressSetId, Config, Error, NetworkId, ProjectId, Result,
    access::Permission,
    firewall::{
        AclRule, AclSpec, AddressSet, AddressSetSpec, ForwardPort, ForwardSpec, NetworkAcl, NetworkForward,
        Policy, Subject, object_name,
    },
    instance::Instance,
    network::{BridgeSpec, Network},
    project::Project,
    spec::NetworkSpec,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

const CALL: Duration = Duration::from_secs(60);

/// The whole of what a user may set of an ACL.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UpdateAcl {
    /// User's text.
    pub description: String,
    /// `user.*`.
    pub config: Config,
    /// Rules for what comes to guests.
    pub ingress: Vec<AclRule>,
    /// Rules for what guests send.
    pub egress: Vec<AclRule>,
    /// `spec_version` that was read (If-Match).
    pub if_version: Option<u64>,
}

/// The whole of what a user may set of an address set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UpdateAddressSet {
    /// User's text.
    pub description: String,
    /// `user.*`.
    pub config: Config,
    /// Addresses, subnets, ranges.
    pub addresses: Vec<String>,
    /// `spec_version` that was read (If-Match).
    pub if_version: Option<u64>,
}

/// The whole of what a user may set of a forward.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UpdateForward {
    /// User's text.
    pub description: String,
    /// `target_address` and `user.*`.
    pub config: Config,
    /// Ports.
    pub ports: Vec<ForwardPort>,
    /// `spec_version` that was read (If-Match).
    pub if_version: Option<u64>,
}

fn user_keys(config: &Config) -> Result<()> {
    for (key, value) in config {
        karst_model::keys::check_free(key, value)?;
        if !key.starts_with("user.") {
            return Err(Error::invalid(
                format!("config.{key}"),
                format!("unknown key {key:?}; known are user.*"),
            ));
        }
    }
    Ok(())
}

fn version(read: Option<u64>, now: u64, what: &str, name: &str) -> Result<()> {
    if read.is_some_and(|v| v != now) {
        return Err(Error::precondition_failed(format!(
            "{what} {name:?} has changed since it was read; read it again"
        )));
    }
    Ok(())
}

/// What [`Tx::touch`] takes for an ACL or address set.
fn uses(kind: &str, id: uuid::Uuid) -> String {
    format!("network-{kind}/{id}")
}

/// Of a transaction that makes something in a project: whoever changes what it has of its own, or removes it, learns of it.
fn begin_in(tx: &mut Tx, project: &Row<Project>) {
    tx.expect(project);
    tx.touch(&crate::tenancy::project_uses(project.id));
}

/// ACLs that a policy of something of `project` names exist; marked as used.
pub(crate) fn check_policy(
    records: &Records,
    tx: &mut Tx,
    project: ProjectId,
    policy: Option<&Policy>,
    field: &str,
) -> Result<()> {
    for name in policy.into_iter().flat_map(|p| &p.acls) {
        let row = records.acl(project, name).map_err(|e| e.at(field))?;
        tx.expect(row);
        tx.touch(&uses("acls", row.id.uuid()));
    }
    Ok(())
}

/// What of the firewall a network's host gets.
pub(crate) struct Rules {
    pub acls: Vec<AclSpec>,
    pub sets: Vec<AddressSetSpec>,
    pub forwards: Vec<ForwardSpec>,
}

/// Everything that the network, its NICs, and the ACLs of those refer to.
pub(crate) fn rules_of(
    records: &Records,
    network: &Network,
    spec: &BridgeSpec,
    policies: &[&Policy],
) -> Rules {
    let mut names: BTreeSet<&str> = policies
        .iter()
        .copied()
        .chain(&spec.policy)
        .flat_map(|p| p.acls.iter().map(String::as_str))
        .collect();
    let (mut acls, mut sets) = (BTreeMap::new(), BTreeMap::new());
    let mut parsed: Vec<AclSpec> = vec![];
    for name in std::mem::take(&mut names) {
        // Checked when it was written; what cannot be read any more leaves its default action.
        if let Some(acl) = records.acl(network.project, name).ok().and_then(|row| row.parse().ok()) {
            parsed.push(acl);
        }
    }
    for acl in parsed {
        for subject in acl.ingress.iter().chain(&acl.egress).flat_map(|r| r.references()) {
            match subject {
                Subject::Set(name) => {
                    let row = records.address_set(network.project, name).ok();
                    if let Some(set) = row.and_then(|row| row.parse().ok()) {
                        sets.insert(set.name.clone(), set);
                    }
                }
                Subject::Acl(name) => {
                    if let Ok(row) = records.acl(network.project, name) {
                        let bare =
                            AclSpec { id: row.id, name: name.clone(), ingress: vec![], egress: vec![] };
                        acls.entry(name.clone()).or_insert(bare);
                    }
                }
                _ => {}
            }
        }
        acls.insert(acl.name.clone(), acl);
    }
    let forwards = records.forwards.values().filter(|f| f.network == network.id);
    Rules {
        acls: acls.into_values().collect(),
        sets: sets.into_values().collect(),
        forwards: forwards.filter_map(|f| f.parse(spec).ok()).collect(),
    }
}

/// Whose devices and networks name an ACL: paths, as far as `sees`.
fn acl_users(records: &Records, acl: &NetworkAcl, sees: &dyn Fn(ProjectId) -> bool) -> UsedBy {
    let mut used: UsedBy = vec![];
    let (name, home) = (&*acl.name, acl.project);
    let users = records.network_users(home);
    let sees = |project: ProjectId| sees(project) && users.contains(&project);
    let names = |text: Option<&String>| text.is_some_and(|t| t.split(',').any(|w| w.trim() == name));
    for network in records.networks.values().filter(|n| n.project == home && sees(n.project)) {
        if names(network.config.get("security.acls")) {
            used.push(records.path_in("networks", &network.name, home));
        }
    }
    let in_devices = |devices: &karst_model::device::Devices| {
        devices
            .values()
            .any(|keys| keys.get("type").is_some_and(|t| t == "nic") && names(keys.get("security.acls")))
    };
    for profile in records.profiles.values().filter(|p| sees(p.project) && in_devices(&p.devices)) {
        used.push(records.path_in("profiles", &profile.name, profile.project));
    }
    let runs_with = |i: &Instance| records.runtimes.get(&i.id).and_then(|r| r.applied.as_ref());
    let has =
        |i: &Instance| in_devices(&i.devices) || runs_with(i).is_some_and(|run| in_devices(&run.devices));
    for instance in records.instances.values().filter(|i| sees(i.project) && has(i)) {
        let project = records.projects.get(&instance.project).map(|p| p.name.to_string()).unwrap_or_default();
        used.push(crate::compute::path(&project, &instance.name));
    }
    for other in records.acls.values().filter(|a| a.project == home && a.id != acl.id && sees(home)) {
        if refers(other, &Subject::Acl(name.to_owned())) {
            used.push(records.path_in("network-acls", &other.name, home));
        }
    }
    used
}

fn refers(acl: &NetworkAcl, to: &Subject) -> bool {
    acl.parse().is_ok_and(|a| a.ingress.iter().chain(&a.egress).flat_map(|r| r.references()).any(|s| s == to))
}

/// Nothing names it, out of all that `users` answers by whose projects are looked at.
fn demand_unused(
    context: &Context,
    what: &str,
    name: &str,
    users: impl Fn(&dyn Fn(ProjectId) -> bool) -> UsedBy,
) -> Result<()> {
    let all = users(&|_| true);
    if all.is_empty() {
        return Ok(());
    }
    let seen = users(&|p| context.principal().may(Permission::ProjectView, Some(p)));
    Err(Error::conflict(format!("{what} {name:?} is used by {}", users_in_words(&seen, &all))))
}

/// An ACL's references exist and stay; the typed form is right.
fn check_acl(records: &Records, tx: &mut Tx, acl: &NetworkAcl) -> Result<()> {
    user_keys(&acl.config)?;
    let spec = acl.parse()?;
    for (rules, direction) in [(&spec.ingress, "ingress"), (&spec.egress, "egress")] {
        for rule in rules {
            for subject in rule.references() {
                let side = if direction == "ingress" { "source" } else { "destination" };
                let field = format!("{direction}[{}].{side}", rule.number);
                match subject {
                    Subject::Acl(name) if *name != *acl.name => {
                        let row = records.acl(acl.project, name).map_err(|e| e.at(field))?;
                        tx.expect(row);
                        tx.touch(&uses("acls", row.id.uuid()));
                    }
                    Subject::Set(name) => {
                        let row = records.address_set(acl.project, name).map_err(|e| e.at(field))?;
                        tx.expect(row);
                        tx.touch(&uses("sets", row.id.uuid()));
                    }
                    _ => {}
                }
            }
        }
    }
    Ok(())
}

impl EngineInner {
    /// What a deleted ACL logged goes too.
    async fn forget_acl_log(&self, id: AclId) {
        let removed = match self.agents.get(self.node) {
            Ok(agent) => agent.acl_log_remove(&self.reconcile_context(CALL), id).await,
            Err(e) => Err(e),
        };
        if let Err(e) = removed {
            tracing::warn!(acl = %id, error = %e, "what a deleted network ACL logged stays until its host finds it old");
        }
    }

    /// Brings all networks of this node up to date whose specification `concerns` picks.
    async fn push_rules(&self, concerns: impl Fn(&NetworkSpec) -> bool) {
        let ids: Vec<NetworkId> = {
            let records = self.inventory.read();
            let active = records.networks.values().filter(|n| n.is_active());
            let specs = active.filter_map(|n| self.network_spec(&records, n.id).ok());
            specs.filter(|s| concerns(s)).map(|s| s.id).collect()
        };
        for id in ids {
            if let Err(e) = self.reconcile_network(self.node, id, &self.reconcile_context(CALL)).await {
                tracing::warn!(network = %id, error = %e, "the network's rules are behind; its reconciler tries again");
            }
        }
    }
}

impl Engine {
    /// All ACLs, by name.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn acls(&self, context: &Context, project: &str) -> Result<Vec<Row<NetworkAcl>>> {
        let project = self.project(context, project, Permission::ProjectView)?;
        let records = self.inner().inventory.read();
        let (seen, home) = (records.seen_acls(&project), records.network_home(project.id));
        let has = |a: &&Row<NetworkAcl>| a.project == home && seen.has(&a.name);
        let mut all: Vec<_> = records.acls.values().filter(has).cloned().collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// An ACL by name.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn acl(&self, context: &Context, project: &str, name: &str) -> Result<Row<NetworkAcl>> {
        let project = self.project(context, project, Permission::ProjectView)?;
        let records = self.inner().inventory.read();
        let row = records.acl(project.id, name)?;
        match records.seen_acls(&project).has(&row.name) {
            true => Ok(row.clone()),
            false => Err(no_acl(name)),
        }
    }

    /// What names an ACL, as far as `context` may see it.
    pub fn acl_used_by(&self, context: &Context, acl: &NetworkAcl) -> UsedBy {
        let sees = |p: ProjectId| context.principal().may(Permission::ProjectView, Some(p));
        acl_users(&self.inner().inventory.read(), acl, &sees)
    }

    /// Creates an ACL.
    ///
    /// # Errors
    /// Invalid by field, conflict (taken name), forbidden.
    pub async fn acl_create(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        new: UpdateAcl,
    ) -> Result<()> {
        let project = self.network_project(context, project)?;
        let inner = self.inner();
        let name = object_name("name", name)?;
        let id = AclId(inner.env.uuid());
        inner
            .transact(|records, tx| {
                if records.acl(project.id, &name).is_ok() {
                    return Err(
                        Error::conflict(format!("a network ACL {:?} exists already", &*name)).at("name")
                    );
                }
                let acl = NetworkAcl {
                    id,
                    project: project.id,
                    name: name.clone(),
                    description: new.description.clone(),
                    config: new.config.clone(),
                    ingress: new.ingress.clone(),
                    egress: new.egress.clone(),
                    spec_version: 1,
                };
                check_acl(records, tx, &acl)?;
                begin_in(tx, &project);
                tx.take_name("network-acls", &records.network_scope(project.id), &name, &id.to_string());
                tx.create(&acl);
                Ok(())
            })
            .await?;
        let path = inner.inventory.read().path_in("network-acls", &name, project.id);
        inner.announce(context, Some(project.id), "network-acl-created", path);
        Ok(())
    }

    /// Replaces an ACL, live.
    ///
    /// # Errors
    /// Invalid by field, not found, precondition failed, forbidden.
    pub async fn acl_update(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        new: UpdateAcl,
    ) -> Result<()> {
        let project = self.network_project(context, project)?;
        let inner = self.inner();
        let id = inner
            .transact(|records, tx| {
                let row = records.acl(project.id, name)?;
                version(new.if_version, row.spec_version, "network ACL", name)?;
                let acl = NetworkAcl {
                    description: new.description.clone(),
                    config: new.config.clone(),
                    ingress: new.ingress.clone(),
                    egress: new.egress.clone(),
                    spec_version: row.spec_version + 1,
                    ..row.value.clone()
                };
                check_acl(records, tx, &acl)?;
                tx.replace(row, &acl);
                Ok(row.id)
            })
            .await?;
        inner.push_rules(|s| s.acls.iter().any(|a| a.id == id)).await;
        let path = inner.inventory.read().path_in("network-acls", name, project.id);
        inner.announce(context, Some(project.id), "network-acl-updated", path);
        Ok(())
    }

    /// Renames an ACL that nothing uses.
    ///
    /// # Errors
    /// Invalid name, not found, conflict (taken, used), forbidden.
    pub async fn acl_rename(&self, context: &Context, project: &str, name: &str, new: &str) -> Result<()> {
        let project = self.network_project(context, project)?;
        let inner = self.inner();
        let new = object_name("name", new)?;
        inner
            .transact(|records, tx| {
                let row = records.acl(project.id, name)?;
                if records.acl(project.id, &new).is_ok() {
                    return Err(
                        Error::conflict(format!("a network ACL {:?} exists already", &*new)).at("name")
                    );
                }
                demand_unused(context, "network ACL", name, |sees| acl_users(records, row, sees))?;
                tx.expect_untouched(records, &uses("acls", row.id.uuid()));
                let acl =
                    NetworkAcl { name: new.clone(), spec_version: row.spec_version + 1, ..row.value.clone() };
                let scope = records.network_scope(project.id);
                tx.release_name("network-acls", &scope, name, &row.id.to_string());
                tx.take_name("network-acls", &scope, &new, &row.id.to_string());
                tx.replace(row, &acl);
                Ok(())
            })
            .await?;
        let path = inner.inventory.read().path_in("network-acls", &new, project.id);
        inner.announce(context, Some(project.id), "network-acl-renamed", path);
        Ok(())
    }

    /// What the rules of an ACL logged on its host, one entry of JSON a line, the newest at the end. It tells of the guests of all
    /// projects that use the ACL: for who may change it.
    ///
    /// # Errors
    /// Not found, forbidden, unavailable; unsupported where the host's kernel keeps it to itself.
    pub async fn acl_log(&self, context: &Context, project: &str, name: &str) -> Result<Vec<u8>> {
        let project = self.network_project(context, project)?;
        let acl = self.inner().inventory.read().acl(project.id, name)?.id;
        let agent = self.inner().agents.get(self.inner().node)?;
        let request = AclLogRead { acl, max: ACL_LOG_BYTES };
        agent.acl_log(&CallContext::read(Duration::from_secs(10)), request).await
    }

    /// Deletes an ACL that nothing uses.
    ///
    /// # Errors
    /// Not found, conflict when it is used, forbidden.
    pub async fn acl_delete(&self, context: &Context, project: &str, name: &str) -> Result<()> {
        let project = self.network_project(context, project)?;
        let inner = self.inner();
        let id = inner
            .transact(|records, tx| {
                let row = records.acl(project.id, name)?;
                demand_unused(context, "network ACL", name, |sees| acl_users(records, row, sees))?;
                tx.expect_untouched(records, &uses("acls", row.id.uuid()));
                tx.release_name(
                    "network-acls",
                    &records.network_scope(project.id),
                    name,
                    &row.id.to_string(),
                );
                tx.delete_id::<Uses>(&uses("acls", row.id.uuid()));
                tx.delete(row);
                Ok(row.id)
            })
            .await?;
        inner.forget_acl_log(id).await;
        let path = inner.inventory.read().path_in("network-acls", name, project.id);
        inner.announce(context, Some(project.id), "network-acl-deleted", path);
        Ok(())
    }

    /// All address sets, by name.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn address_sets(&self, context: &Context, project: &str) -> Result<Vec<Row<AddressSet>>> {
        let project = self.project(context, project, Permission::ProjectView)?;
        let records = self.inner().inventory.read();
        let (seen, home) = (records.seen_address_sets(&project), records.network_home(project.id));
        let has = |s: &&Row<AddressSet>| s.project == home && seen.has(&s.name);
        let mut all: Vec<_> = records.address_sets.values().filter(has).cloned().collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// An address set by name.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn address_set(&self, context: &Context, project: &str, name: &str) -> Result<Row<AddressSet>> {
        let project = self.project(context, project, Permission::ProjectView)?;
        let records = self.inner().inventory.read();
        let row = records.address_set(project.id, name)?;
        match records.seen_address_sets(&project).has(&row.name) {
            true => Ok(row.clone()),
            false => Err(Error::not_found(format!("address set {name:?} not found"))),
        }
    }

    /// ACLs that name an address set.
    pub fn address_set_used_by(&self, context: &Context, set: &AddressSet) -> UsedBy {
        // Sets and ACLs belong to the same project: who may see the set may see them.
        match context.principal().may(Permission::ProjectView, Some(set.project)) {
            true => set_users(&self.inner().inventory.read(), set),
            false => vec![],
        }
    }

    /// Creates an address set.
    ///
    /// # Errors
    /// Invalid by field, conflict (taken name), forbidden.
    pub async fn address_set_create(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        new: UpdateAddressSet,
    ) -> Result<()> {
        let project = self.network_project(context, project)?;
        let inner = self.inner();
        let name = object_name("name", name)?;
        let set = AddressSet {
            id: AddressSetId(inner.env.uuid()),
            project: project.id,
            name: name.clone(),
            description: new.description,
            config: new.config,
            addresses: new.addresses,
            spec_version: 1,
        };
        user_keys(&set.config)?;
        set.parse()?;
        inner
            .transact(|records, tx| {
                if records.address_set(project.id, &name).is_ok() {
                    return Err(
                        Error::conflict(format!("an address set {:?} exists already", &*name)).at("name")
                    );
                }
                begin_in(tx, &project);
                let scope = records.network_scope(project.id);
                tx.take_name("network-address-sets", &scope, &name, &set.id.to_string());
                tx.create(&set);
                Ok(())
            })
            .await?;
        let path = inner.inventory.read().path_in("network-address-sets", &name, project.id);
        inner.announce(context, Some(project.id), "network-address-set-created", path);
        Ok(())
    }

    /// Replaces an address set, live.
    ///
    /// # Errors
    /// Invalid by field, not found, precondition failed, forbidden.
    pub async fn address_set_update(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        new: UpdateAddressSet,
    ) -> Result<()> {
        let project = self.network_project(context, project)?;
        let inner = self.inner();
        let id = inner
            .transact(|records, tx| {
                let row = records.address_set(project.id, name)?;
                version(new.if_version, row.spec_version, "address set", name)?;
                let set = AddressSet {
                    description: new.description.clone(),
                    config: new.config.clone(),
                    addresses: new.addresses.clone(),
                    spec_version: row.spec_version + 1,
                    ..row.value.clone()
                };
                user_keys(&set.config)?;
                set.parse()?;
                tx.replace(row, &set);
                Ok(row.id)
            })
            .await?;
        inner.push_rules(|s| s.sets.iter().any(|a| a.id == id)).await;
        let path = inner.inventory.read().path_in("network-address-sets", name, project.id);
        inner.announce(context, Some(project.id), "network-address-set-updated", path);
        Ok(())
    }

    /// Renames an address set that nothing uses.
    ///
    /// # Errors
    /// Invalid name, not found, conflict (taken, used), forbidden.
    pub async fn address_set_rename(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        new: &str,
    ) -> Result<()> {
        let project = self.network_project(context, project)?;
        let inner = self.inner();
        let new = object_name("name", new)?;
        inner
            .transact(|records, tx| {
                let row = records.address_set(project.id, name)?;
                if records.address_set(project.id, &new).is_ok() {
                    return Err(
                        Error::conflict(format!("an address set {:?} exists already", &*new)).at("name")
                    );
                }
                demand_unused(context, "address set", name, |_| set_users(records, row))?;
                tx.expect_untouched(records, &uses("sets", row.id.uuid()));
                let set =
                    AddressSet { name: new.clone(), spec_version: row.spec_version + 1, ..row.value.clone() };
                let scope = records.network_scope(project.id);
                tx.release_name("network-address-sets", &scope, name, &row.id.to_string());
                tx.take_name("network-address-sets", &scope, &new, &row.id.to_string());
                tx.replace(row, &set);
                Ok(())
            })
            .await?;
        let path = inner.inventory.read().path_in("network-address-sets", &new, project.id);
        inner.announce(context, Some(project.id), "network-address-set-renamed", path);
        Ok(())
    }

    /// Deletes an address set that nothing uses.
    ///
    /// # Errors
    /// Not found, conflict when it is used, forbidden.
    pub async fn address_set_delete(&self, context: &Context, project: &str, name: &str) -> Result<()> {
        let project = self.network_project(context, project)?;
        let inner = self.inner();
        inner
            .transact(|records, tx| {
                let row = records.address_set(project.id, name)?;
                demand_unused(context, "address set", name, |_| set_users(records, row))?;
                tx.expect_untouched(records, &uses("sets", row.id.uuid()));
                let scope = records.network_scope(project.id);
                tx.release_name("network-address-sets", &scope, name, &row.id.to_string());
                tx.delete_id::<Uses>(&uses("sets", row.id.uuid()));
                tx.delete(row);
                Ok(())
            })
            .await?;
        let path = inner.inventory.read().path_in("network-address-sets", name, project.id);
        inner.announce(context, Some(project.id), "network-address-set-deleted", path);
        Ok(())
    }

    /// Forwards of a network, by listen address; where they lead, as far as `context` sees the guests.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub async fn forwards(
        &self,
        context: &Context,
        project: &str,
        network: &str,
    ) -> Result<Vec<Row<NetworkForward>>> {
        let network = self.network(context, project, network)?;
        let mut all: Vec<_> = {
            let records = self.inner().inventory.read();
            records.forwards.values().filter(|f| f.network == network.id).cloned().collect()
        };
        all.sort_by_key(|f| f.listen_address);
        self.show_forwards(context, project, &network, all).await
    }

    /// A forward by its listen address.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub async fn forward(
        &self,
        context: &Context,
        project: &str,
        network: &str,
        listen: &str,
    ) -> Result<Row<NetworkForward>> {
        let network = self.network(context, project, network)?;
        let found = forward_row(&self.inner().inventory.read(), network.id, listen)?.clone();
        let shown = self.show_forwards(context, project, &network, vec![found]).await?;
        shown.into_iter().next().ok_or_else(|| Error::not_found("the forward is gone"))
    }

    /// Creates a forward, live.
    ///
    /// # Errors
    /// Invalid by field, conflict (the address is taken), not found, forbidden.
    pub async fn forward_create(
        &self,
        context: &Context,
        project: &str,
        network: &str,
        listen: &str,
        new: UpdateForward,
    ) -> Result<()> {
        let owner = self.forward_project(context, project)?;
        let inner = self.inner();
        let listen: IpAddr = listen
            .parse()
            .map_err(|_| Error::invalid("listen_address", format!("{listen:?} is not an IP address")))?;
        let id = inner
            .transact(|records, tx| {
                let row = records.network(owner.id, network)?;
                let forward = NetworkForward {
                    network: row.id,
                    listen_address: listen,
                    description: new.description.clone(),
                    config: new.config.clone(),
                    ports: new.ports.clone(),
                    spec_version: 1,
                };
                forward.parse(&row.bridge()?)?;
                if let Some(other) = records.forwards.values().find(|f| f.listen_address == listen) {
                    let of = records.networks.get(&other.network).filter(|n| n.project == owner.id);
                    let of = of
                        .map_or("a network of another project".into(), |n| format!("network {:?}", &*n.name));
                    return Err(Error::conflict(format!("{of} has a forward of {listen} already"))
                        .at("listen_address"));
                }
                if let Some(other) = records
                    .networks
                    .values()
                    .find(|n| n.bridge().is_ok_and(|s| s.subnets().any(|net| net.contains(&listen))))
                {
                    let of = match other.project == owner.id {
                        true => format!("network {:?}", &*other.name),
                        false => "a network of another project".into(),
                    };
                    return Err(Error::conflict(format!("{listen} belongs to {of}")).at("listen_address"));
                }
                tx.expect(row);
                tx.expect_unlocked(&crate::network::lock(row.id));
                // One listen address, whichever networks two creations name.
                tx.take_name("network-forwards", "", &listen.to_string(), &row.id.to_string());
                tx.create(&forward);
                Ok(row.id)
            })
            .await?;
        inner.push_rules(|s| s.id == id).await;
        let path = forward_path(&inner.inventory.read(), network, &listen.to_string(), owner.id);
        inner.announce(context, Some(owner.id), "network-forward-created", path);
        Ok(())
    }

    /// Replaces a forward, live.
    ///
    /// # Errors
    /// Invalid by field, not found, precondition failed, forbidden.
    pub async fn forward_update(
        &self,
        context: &Context,
        project: &str,
        network: &str,
        listen: &str,
        new: UpdateForward,
    ) -> Result<()> {
        let owner = self.forward_project(context, project)?;
        let inner = self.inner();
        let id = inner
            .transact(|records, tx| {
                let net = records.network(owner.id, network)?;
                let row = forward_row(records, net.id, listen)?;
                version(new.if_version, row.spec_version, "forward", listen)?;
                let forward = NetworkForward {
                    description: new.description.clone(),
                    config: new.config.clone(),
                    ports: new.ports.clone(),
                    spec_version: row.spec_version + 1,
                    ..row.value.clone()
                };
                forward.parse(&net.bridge()?)?;
                tx.expect(net);
                tx.replace(row, &forward);
                Ok(net.id)
            })
            .await?;
        inner.push_rules(|s| s.id == id).await;
        let path = forward_path(&inner.inventory.read(), network, listen, owner.id);
        inner.announce(context, Some(owner.id), "network-forward-updated", path);
        Ok(())
    }

    /// Deletes a forward, live.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub async fn forward_delete(
        &self,
        context: &Context,
        project: &str,
        network: &str,
        listen: &str,
    ) -> Result<()> {
        let owner = self.forward_project(context, project)?;
        let inner = self.inner();
        let id = inner
            .transact(|records, tx| {
                let net = records.network(owner.id, network)?;
                let row = forward_row(records, net.id, listen)?;
                tx.release_name("network-forwards", "", &row.listen_address.to_string(), &net.id.to_string());
                tx.delete(row);
                Ok(net.id)
            })
            .await?;
        inner.push_rules(|s| s.id == id).await;
        let path = forward_path(&inner.inventory.read(), network, listen, owner.id);
        inner.announce(context, Some(owner.id), "network-forward-deleted", path);
        Ok(())
    }
}

/// The address sets that an ACL names.
pub(crate) fn sets_of(acl: &NetworkAcl) -> BTreeSet<String> {
    let Ok(spec) = acl.parse() else { return BTreeSet::new() };
    let all = spec.ingress.iter().chain(&spec.egress).flat_map(|rule| rule.references());
    let set = |subject: &Subject| match subject {
        Subject::Set(name) => Some(name.clone()),
        _ => None,
    };
    all.filter_map(set).collect()
}

fn set_users(records: &Records, set: &AddressSet) -> UsedBy {
    let subject = Subject::Set(set.name.to_string());
    let all = records.acls.values().filter(|a| a.project == set.project && refers(a, &subject));
    all.map(|a| records.path_in("network-acls", &a.name, a.project)).collect()
}

fn forward_path(records: &Records, network: &str, listen: &str, project: ProjectId) -> String {
    records.path_in("networks", &format!("{network}/forwards/{listen}"), project)
}

fn forward_row<'a>(
    records: &'a Records,
    network: NetworkId,
    listen: &str,
) -> Result<&'a Row<NetworkForward>> {
    let missing = || Error::not_found(format!("the network has no forward of {listen:?}"));
    let listen: IpAddr = listen.parse().map_err(|_| missing())?;
    records.forwards.values().find(|f| f.network == network && f.listen_address == listen).ok_or_else(missing)
}
