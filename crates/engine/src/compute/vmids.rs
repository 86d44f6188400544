//! VMIDs: which number an instance gets, and that none ever comes back.
//!
//! A number is drawn or chosen by the client. Drawn ones only grow: the highest is known from the instances that are here and
//! from a mark that is written when one of them goes. All numbers up to it have been given out. A chosen number may lie far
//! above; it is not drawn later, and when its instance goes a key of its own says so. Who has a number is an index key, as
//! with names. No number comes back, because logs and backups go on naming it.

use crate::{
    EngineInner, Records,
    context::Context,
    db::Tx,
    inventory::{RETIRED_VMIDS, VMID_KEY},
};
use karst_model::{
    Error, Result, Vmid,
    access::Permission,
    instance::{Instance, Lifecycle},
};
use std::sync::atomic::Ordering;

fn retired(vmid: Vmid) -> String {
    format!("{RETIRED_VMIDS}{vmid}")
}

/// Numbers are the cluster's: a refusal tells of others' guests, and one that was taken never comes back.
///
/// # Errors
/// Forbidden, at `vmid`, for who may make instances in some projects only.
pub(crate) fn demand_choice(context: &Context, vmid: Option<Vmid>) -> Result<()> {
    if vmid.is_none() || context.principal().may(Permission::ResourceEdit, None) {
        return Ok(());
    }
    let text =
        "VMIDs are chosen by those who may make instances in all projects; leave it out to be given one";
    Err(Error::forbidden(text).at("vmid"))
}

impl EngineInner {
    /// A VMID that nothing has or had, as far as is known here; the transaction takes it or is refused.
    pub(crate) fn take_vmid(&self, records: &Records, tx: &mut Tx) -> Vmid {
        let given = |n: u32| records.taken_vmids.contains(&n) || records.retired_vmids.contains(&n);
        let next = |n: u32| {
            let least = n.max(records.highest_vmid + 1);
            (least..).find(|n| !given(*n)).unwrap_or(least)
        };
        // The closure always answers, so there is always a number from before.
        let update = |n: u32| Some(next(n) + 1);
        let before = self.next_vmid.fetch_update(Ordering::Relaxed, Ordering::Relaxed, update);
        let vmid = Vmid(next(before.unwrap_or_else(|n| n)));
        tx.expect_raw(&retired(vmid), None);
        vmid
    }

    /// The VMID that a client chose; the transaction takes it or is refused.
    ///
    /// # Errors
    /// Invalid, or conflict, at `vmid`.
    pub(crate) fn choose_vmid(&self, records: &Records, tx: &mut Tx, vmid: Vmid) -> Result<Vmid> {
        let vmid = Vmid::chosen("vmid", vmid.0)?;
        let another = "choose another, or leave it out to be given one";
        if records.taken_vmids.contains(&vmid.0) {
            return Err(Error::conflict(format!("VMID {vmid} is taken; {another}")).at("vmid"));
        }
        if vmid.0 <= records.highest_vmid || records.retired_vmids.contains(&vmid.0) {
            let text = format!("VMID {vmid} was given out before, and none is given out twice; {another}");
            return Err(Error::conflict(text).at("vmid"));
        }
        // Taken and come back since it was looked at?
        tx.expect_raw(&retired(vmid), None);
        tx.expect_raw(VMID_KEY, records.vmid_mark.1);
        Ok(vmid)
    }
}

/// Writes down, where need be, that the VMID of an instance does not come back, which goes with this transaction.
pub(crate) fn retire(tx: &mut Tx, records: &Records, instance: &Instance) {
    let vmid = instance.vmid;
    if instance.vmid_chosen && vmid.0 > records.highest_vmid {
        // What was never there may be tried again under its number.
        if instance.lifecycle != Lifecycle::Creating {
            tx.put_raw(&retired(vmid), instance.id.to_string());
        }
        return;
    }
    let (known, revision) = records.vmid_mark;
    if vmid.0 <= known && revision.is_some() {
        return;
    }
    tx.expect_raw(VMID_KEY, revision);
    tx.put_raw(VMID_KEY, records.highest_vmid.max(vmid.0).to_string());
}
