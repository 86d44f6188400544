//! Render nodes of the host's graphics cards, with which QEMU draws the screens of machines that ask for it: those that the policy
//! names, and no others.

use crate::policy::{FILE, HostPolicy};
use karst_model::{Error, Result, board::AUTO_RENDER, spec::MachineSpec};
use std::os::unix::fs::FileTypeExt;

const FIELD: &str = "config.hardware.video.render";

impl HostPolicy {
    /// A machine that leaves the choice to its host has the first that there is; one that this host grants none keeps its wish, and is
    /// refused when it starts.
    pub(crate) fn with_render_node(&self, mut machine: MachineSpec) -> MachineSpec {
        let first = self.render_nodes.iter().find_map(|path| path.to_str());
        if let (Some(AUTO_RENDER), Some(first)) = (machine.board.render.as_deref(), first) {
            machine.board.render = Some(first.to_owned());
        }
        machine
    }

    /// Refuses what is not granted, or no device.
    ///
    /// # Errors
    /// Forbidden, naming what to write; not found where nothing like it is there.
    pub(crate) fn demand_render_node(&self, machine: Option<&MachineSpec>) -> Result<()> {
        let Some(wanted) = machine.and_then(|m| m.board.render.as_deref()) else { return Ok(()) };
        if !self.render_nodes.iter().any(|granted| granted.to_str() == Some(wanted)) {
            let example = if wanted == AUTO_RENDER { "/dev/dri/renderD128" } else { wanted };
            let text = format!(
                "this host draws no machine's screen with a graphics card; its administrator can let it, by render_nodes = [\"{example}\"] \
                 in {FILE}"
            );
            return Err(Error::forbidden(text).at(FIELD));
        }
        match std::fs::symlink_metadata(wanted) {
            Ok(found) if found.file_type().is_char_device() => Ok(()),
            _ => Err(Error::not_found(format!("{wanted} is no device of this host")).at(FIELD)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::ErrorKind;

    #[test]
    fn only_what_the_policy_names_is_drawn_with() {
        let with = |render: Option<&str>| {
            let mut machine = karst_guest::samples::machine(1);
            machine.board.render = render.map(str::to_owned);
            machine
        };
        let none = HostPolicy::default();
        none.demand_render_node(Some(&with(None))).unwrap();
        none.demand_render_node(None).unwrap();
        assert_eq!(none.with_render_node(with(Some("auto"))).board.render.as_deref(), Some("auto"));
        let e = none.demand_render_node(Some(&with(Some("auto")))).unwrap_err();
        assert!(e.is(ErrorKind::Forbidden) && e.message.contains("render_nodes"), "{e}");
        // Any device will do for one here.
        let policy = HostPolicy { render_nodes: vec!["/dev/null".into()], ..HostPolicy::default() };
        let chosen = policy.with_render_node(with(Some("auto")));
        assert_eq!(chosen.board.render.as_deref(), Some("/dev/null"));
        policy.demand_render_node(Some(&chosen)).unwrap();
        assert!(
            policy.demand_render_node(Some(&with(Some("/dev/zero")))).unwrap_err().is(ErrorKind::Forbidden)
        );
        let gone = HostPolicy { render_nodes: vec!["/dev/no-such".into()], ..HostPolicy::default() };
        let e = gone.demand_render_node(Some(&gone.with_render_node(with(Some("auto"))))).unwrap_err();
        assert!(e.is(ErrorKind::NotFound), "{e}");
    }
}
