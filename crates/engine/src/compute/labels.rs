//! Names of guests in DNS. Names differ by case, `_` and `.`, which DNS labels do not (`Web` and `web`): of the guests of one
//! project on one bridge one has a label. Who would be a second is refused by the request that makes it so. Where records
//! say it all the same (they are older, two came at once, or a profile brought both onto a network) the one that was there
//! first keeps the name, and a warning says who is not found.

use crate::{EngineInner, InstanceView, Records};
use karst_model::{Error, ProjectId, Result, instance::Instance, spec::NetworkHost, uplink::NetworkKind};

/// Under what a guest is found: each project has its own names.
fn found_as(host: &NetworkHost) -> (Option<ProjectId>, &str) {
    (host.view.as_ref().map(|v| v.project), host.hostname.as_str())
}

/// Leaves the name of several guests to the one whose instance was made first; says, for people, who is left without.
pub(crate) fn settle(records: &Records, hosts: &mut [NetworkHost]) -> Vec<String> {
    let mut order: Vec<usize> = (0..hosts.len()).filter(|n| !hosts[*n].hostname.is_empty()).collect();
    order.sort_by(|a, b| found_as(&hosts[*a]).cmp(&found_as(&hosts[*b])));
    let same = |a: &usize, b: &usize| found_as(&hosts[*a]) == found_as(&hosts[*b]);
    let shared: Vec<Vec<usize>> =
        order.chunk_by(same).filter(|g| g.len() > 1).map(<[usize]>::to_vec).collect();
    let mut said = vec![];
    for group in shared {
        let of = |n: &usize| {
            let host = &hosts[*n];
            let mut instances = records.with_mac(&host.mac).filter_map(|id| records.instances.get(&id));
            instances.find(|i| i.name.dns_label() == host.hostname)
        };
        // An interface that is about to be added is in no record yet: the youngest of all.
        let Some(first) = group.iter().filter_map(of).min_by_key(|i| (i.created_at, i.id)) else { continue };
        let mut without = vec![];
        for n in &group {
            match of(n) {
                // Two interfaces of one guest are the host's to choose from.
                Some(i) if i.id == first.id => {}
                Some(i) => {
                    let (name, label) = (&*i.name, &hosts[*n].hostname);
                    said.push(format!(
                        "instance {name:?} is not found by name: {label:?} is instance {:?}",
                        &*first.name
                    ));
                    without.push(*n);
                }
                None => without.push(*n),
            }
        }
        for n in without {
            hosts[n].hostname.clear();
        }
    }
    said
}

impl EngineInner {
    /// The instance, as it is about to be, takes no other's name on the networks that it comes onto.
    ///
    /// # Errors
    /// Conflict at `field`.
    pub(crate) fn demand_own_label(&self, records: &Records, instance: &Instance, field: &str) -> Result<()> {
        let label = instance.name.dns_label();
        let others: Vec<_> =
            records.with_label(instance.project, &label).filter(|id| *id != instance.id).collect();
        if others.is_empty() {
            return Ok(());
        }
        let own = records.nics_of(instance, &records.expanded(instance).1);
        let known = records.with_label(instance.project, &label).any(|id| id == instance.id);
        let before = self.inventory.view(records, instance.id).filter(|_| known);
        for (place, _) in &own {
            let network = records.network_at(instance.project, place);
            let Some(network) = network.filter(|n| n.kind == NetworkKind::Bridge) else { continue };
            let on = |view: &InstanceView| view.nics.iter().any(|(place, _)| place.is(network));
            // Where it is already under this name it may stay, with or without it.
            if before.as_deref().is_some_and(on) {
                continue;
            }
            for other in others.iter().filter_map(|id| self.inventory.view(records, *id)) {
                if on(&other) {
                    return Err(Error::conflict(format!(
                        "the DNS name {label:?} is instance {:?}'s on network {:?}; choose another name or network",
                        &*other.instance.name,
                        &*network.name
                    ))
                    .at(field));
                }
            }
        }
        Ok(())
    }
}
