//! `coracle pull` and `coracle images`.

use anyhow::Result;
use coracle_images::{RegistryOptions, Source, Store};
use coracle_settings::Settings;
use serde_json::json;

use crate::container::Root;
use crate::{rootfs, table};

/// Fetch an image and keep it.
#[derive(Debug, clap::Args)]
pub(crate) struct PullArgs {
    /// oci:DIR[:TAG], oci-archive:FILE, docker-archive:FILE or a registry reference.
    image: String,
    /// The platform of the image: OS/ARCHITECTURE.
    #[arg(long, default_value = "linux/amd64", value_name = "PLATFORM")]
    platform: String,
    /// Speak to the registry without TLS.
    #[arg(long)]
    plain_http: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// List images that were fetched.
#[derive(Debug, clap::Args)]
pub(crate) struct ImagesArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn pull(root: &Root, args: PullArgs) -> Result<()> {
    let source: Source = args.image.parse()?;
    let options = RegistryOptions { plain_http: args.plain_http, credentials: None };
    let progress = |text: &str| eprintln!("coracle: {text}");
    let form = rootfs::form(&Settings::load()?);
    let image = Store::open(&root.images())?.get(&source, &args.platform, form, &options, &progress).await?;
    if args.json {
        let found = json!({ "name": args.image, "platform": args.platform, "digest": image.digest });
        println!("{}", serde_json::to_string_pretty(&found)?);
    } else {
        println!("{}", image.digest);
    }
    Ok(())
}

pub(crate) fn images(root: &Root, args: &ImagesArgs) -> Result<()> {
    let all = Store::open(&root.images())?.all();
    if args.json {
        let all: Vec<_> = all
            .iter()
            .map(|entry| {
                json!({
                    "name": entry.name, "platform": entry.platform, "digest": entry.digest, "used": entry.used,
                    "disk_bytes": entry.disk_bytes(),
                })
            })
            .collect();
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    let rows: Vec<_> = all
        .into_iter()
        .map(|entry| {
            let size = entry.disk_bytes().map_or_else(|| "-".into(), table::size);
            [entry.name, entry.platform, table::short(&entry.digest, 20), size, table::age(entry.used)]
        })
        .collect();
    table::print(["IMAGE", "PLATFORM", "DIGEST", "DISKS", "USED"], &rows);
    Ok(())
}
