//! What clients change of a domain's run and no machine tells of by itself: those who listen are told by whoever changed it.

use super::sides::affects;
use crate::{events::Tuned, session::Call, xdr::Typed};
use karst_engine::InstanceView;

/// Tells that a call with these flags has tuned a domain, where it was its run: names of `VIR_DOMAIN_TUNABLE_*`.
pub(super) fn tuned(call: &Call, view: &InstanceView, flags: u32, parameters: Vec<(String, Typed)>) {
    if !parameters.is_empty() && affects(view, flags).is_ok_and(|affected| affected.run) {
        // An error only says that nobody listens.
        let _ = call.session.front.tuned.send(Tuned { instance: view.instance.id, parameters });
    }
}

/// Parameters of a call as such an event names them: `cputune.cpu_shares`.
pub(super) fn named(group: &str, all: &[(String, Typed)]) -> Vec<(String, Typed)> {
    all.iter().map(|(field, value)| (format!("{group}.{field}"), value.clone())).collect()
}
