//! `coracle`: containers, each in a virtual machine of its own.
fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let package = coracle_guest_image::Package::open(args[1].as_ref())?;
    println!("{:?}", coracle_guest_image::build(&package, args[2].as_ref(), args[3].as_ref())?);
    Ok(())
}
