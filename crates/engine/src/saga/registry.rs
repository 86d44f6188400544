//! All sagas.

use super::{AnySaga, Erased};
use crate::{
    backups, checkpoints, compute, images, layers, network, recover, snapshots, storage, tenancy, volumes,
};
use std::sync::{Arc, LazyLock};

static REGISTRY: LazyLock<Vec<Arc<dyn AnySaga>>> = LazyLock::new(|| {
    vec![
        Arc::new(Erased::<backups::BackupDelete>::new()),
        Arc::new(Erased::<backups::create::BackupCreate>::new()),
        Arc::new(Erased::<backups::import::InstanceImport>::new()),
        Arc::new(Erased::<backups::import::VolumeImport>::new()),
        Arc::new(Erased::<checkpoints::backup::DiskBackingUp>::new()),
        Arc::new(Erased::<checkpoints::create::CheckpointCreate>::new()),
        Arc::new(Erased::<checkpoints::delete::CheckpointDelete>::new()),
        Arc::new(Erased::<compute::copy::InstanceCopy>::new()),
        Arc::new(Erased::<compute::create::InstanceCreate>::new()),
        Arc::new(Erased::<compute::delete::InstanceDelete>::new()),
        Arc::new(Erased::<compute::disk_copy::saga::DiskCopying>::new()),
        Arc::new(Erased::<compute::memory::MemoryDrop>::new()),
        Arc::new(Erased::<compute::memory_files::MemoryWriting>::new()),
        Arc::new(Erased::<compute::power::InstancePower>::new()),
        Arc::new(Erased::<compute::rebuild::InstanceRebuild>::new()),
        Arc::new(Erased::<compute::refresh::ContentRefresh>::new()),
        Arc::new(Erased::<compute::relocate::InstanceMove>::new()),
        Arc::new(Erased::<compute::update::InstanceUpdate>::new()),
        Arc::new(Erased::<images::ImageCreate>::new()),
        Arc::new(Erased::<images::ImageDelete>::new()),
        Arc::new(Erased::<images::publish::ImagePublish>::new()),
        Arc::new(Erased::<layers::create::LayersCreate>::new()),
        Arc::new(Erased::<network::NetworkCreate>::new()),
        Arc::new(Erased::<network::NetworkDelete>::new()),
        Arc::new(Erased::<network::NetworkUpdate>::new()),
        Arc::new(Erased::<recover::saga::PoolRecover>::new()),
        Arc::new(Erased::<recover::saga::VolumeRecover>::new()),
        Arc::new(Erased::<snapshots::create::SnapshotCreate>::new()),
        Arc::new(Erased::<snapshots::delete::SnapshotDelete>::new()),
        Arc::new(Erased::<snapshots::restore::SnapshotRestore>::new()),
        Arc::new(Erased::<snapshots::restore_running::SnapshotRestoreRunning>::new()),
        Arc::new(Erased::<storage::PoolCreate>::new()),
        Arc::new(Erased::<storage::PoolDelete>::new()),
        Arc::new(Erased::<storage::PoolGrowth>::new()),
        Arc::new(Erased::<storage::life::PoolChanging>::new()),
        Arc::new(Erased::<tenancy::profile_update::ProfileUpdate>::new()),
        Arc::new(Erased::<volumes::content::VolumeWipe>::new()),
        Arc::new(Erased::<volumes::content::VolumeWrite>::new()),
        Arc::new(Erased::<volumes::copy::VolumeCopying>::new()),
        Arc::new(Erased::<volumes::create::VolumeCreate>::new()),
        Arc::new(Erased::<volumes::delete::VolumeDelete>::new()),
        Arc::new(Erased::<volumes::relocate::VolumeMove>::new()),
        Arc::new(Erased::<volumes::update::VolumeUpdate>::new()),
    ]
});

/// Every saga that this version can execute or take up.
pub fn registry() -> &'static [Arc<dyn AnySaga>] {
    &REGISTRY
}
