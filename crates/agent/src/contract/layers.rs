//! Layers of the root of a virtual machine, and merges of them.

use super::*;
use crate::layers::*;
use karst_model::{
    guest::{DiskCopyEnd, DiskCopyPhase},
    layer::{Base, Merge},
};

/// A machine that runs, and the volume that is its root.
struct Machine<'a> {
    s: &'a Subject,
    guest: GuestRef,
    root: VolumeRef,
}

impl Machine<'_> {
    fn adding(&self, number: u32) -> MachineLayersAdd {
        let layers = vec![LayerOver { volume: self.root, number }];
        MachineLayersAdd { instance: self.guest.instance, guest: Some(self.guest), layers }
    }

    async fn add(&self, number: u32) -> Result<()> {
        self.s.agent.machine_layers_add(&self.s.change(), self.adding(number)).await
    }

    async fn begin(&self, merge: Merge, speed: u64) -> Result<()> {
        let request = MachineMergeBegin { guest: self.guest, volume: self.root, merge, speed };
        self.s.agent.machine_merge_begin(&self.s.change(), request).await
    }

    async fn end(&self, merge: Merge, end: DiskCopyEnd) -> Result<()> {
        let request = MachineMergeEnd { instance: self.guest.instance, volume: self.root, merge, end };
        self.s.agent.machine_merge_end(&self.s.change(), request).await
    }

    async fn phase(&self) -> DiskCopyPhase {
        let at = MachineCopyRef { instance: self.guest.instance, to: self.root.volume };
        self.s.agent.machine_copy_state(&self.s.read(), at).await.unwrap().phase
    }

    /// From its begin to its end.
    async fn merge(&self, merge: Merge) {
        for _ in 0..2 {
            self.begin(merge, 0).await.unwrap();
        }
        let limit = self.s.boot.max(Duration::from_secs(120));
        let ready = async || {
            matches!(self.phase().await, DiskCopyPhase::Ready | DiskCopyPhase::Pivoted).then_some(())
        };
        self.s.until("the merge", limit, ready).await;
        for _ in 0..2 {
            self.end(merge, DiskCopyEnd::Pivot).await.unwrap();
        }
        assert_eq!(self.phase().await, DiskCopyPhase::Pivoted);
        refused(self.end(merge, DiskCopyEnd::Cancel).await, ErrorKind::Conflict);
    }
}

/// Layers over the root of a machine that runs, which is one file again afterwards.
pub(super) async fn of_a_root(s: &Subject, spec: &GuestSpec, root: VolumeRef) {
    let agent = &s.agent;
    let guest = GuestRef { instance: spec.instance, generation: spec.generation };
    let m = Machine { s, guest, root };

    // What cannot be leaves nothing.
    let mut twice = m.adding(1);
    twice.layers.push(twice.layers[0]);
    refused(agent.machine_layers_add(&s.change(), twice).await, ErrorKind::Invalid);
    let stopped = MachineLayersAdd { guest: None, ..m.adding(1) };
    refused(agent.machine_layers_add(&s.change(), stopped).await, ErrorKind::Conflict);
    let pool = s.pool().await;
    let size = Some(ByteSize::gib(1));
    let other = VolumeSpec { size, ..s.volume(pool, InstanceKind::VirtualMachine, None) };
    let at = VolumeRef { pool, volume: other.id };
    agent.volume_create(&s.change(), other).await.unwrap();
    let foreign = MachineLayersAdd { layers: vec![LayerOver { volume: at, number: 1 }], ..m.adding(1) };
    refused(agent.machine_layers_add(&s.change(), foreign).await, ErrorKind::NotFound);
    refused(m.begin(Merge::Commit { top: 1, base: Base::Lowest }, 0).await, ErrorKind::Conflict);

    // Of one that nobody runs the file is all there is to it.
    let nobody = MachineLayersAdd {
        instance: InstanceId(s.env.uuid()),
        guest: None,
        layers: vec![LayerOver { volume: at, number: 4 }],
    };
    for _ in 0..2 {
        agent.machine_layers_add(&s.change(), nobody.clone()).await.unwrap();
    }
    refused(agent.volume_snapshot_create(&s.change(), s.snapshot(at)).await, ErrorKind::Conflict);
    for _ in 0..2 {
        assert!(!agent.machine_layers_take_back(&s.change(), nobody.clone()).await.unwrap());
    }
    let snapshot = s.snapshot(at);
    agent.volume_snapshot_create(&s.change(), snapshot).await.expect("it is one file again");
    agent.volume_delete(&s.change(), at).await.unwrap();

    // Three, of which the one in the middle goes, then the active one, then all that is below.
    for number in [2, 2, 3, 5] {
        m.add(number).await.unwrap();
    }
    refused(m.add(4).await, ErrorKind::Invalid);
    assert!(
        agent.machine_layers_take_back(&s.change(), m.adding(5)).await.unwrap(),
        "the guest goes on in it"
    );
    refused(agent.volume_snapshot_create(&s.change(), s.snapshot(root)).await, ErrorKind::Conflict);
    refused(m.begin(Merge::Commit { top: 2, base: Base::Layer(3) }, 0).await, ErrorKind::Invalid);
    refused(m.begin(Merge::Pull { base: None }, u64::MAX).await, ErrorKind::Invalid);
    let commit = Merge::Commit { top: 5, base: Base::Layer(3) };
    m.begin(commit, 1).await.unwrap();
    m.end(commit, DiskCopyEnd::Cancel).await.unwrap();
    assert_eq!(m.phase().await, DiskCopyPhase::Gone);
    m.merge(Merge::Commit { top: 3, base: Base::Layer(2) }).await;
    m.merge(Merge::Commit { top: 5, base: Base::Layer(2) }).await;
    let observed = agent.guest_observe_all(&s.read(), ()).await.unwrap();
    let now = observed.into_iter().find(|o| o.instance == guest.instance).unwrap();
    assert_eq!(now.state, karst_model::instance::RuntimeState::Running);
    m.merge(Merge::Pull { base: None }).await;
    refused(m.begin(Merge::Pull { base: None }, 0).await, ErrorKind::Conflict);

    // It is a disk as any other, and a layer over it is one.
    m.add(6).await.unwrap();
    m.merge(Merge::Commit { top: 6, base: Base::Lowest }).await;
}
